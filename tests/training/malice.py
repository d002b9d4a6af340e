"""A pickle that does something when it is loaded."""

import os
from pathlib import Path


class Evil:
    """Unpickled, it makes a folder, if anybody lets it. Args: mark: the folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)
