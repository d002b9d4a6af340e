"""python -m diffusion_ext, and the program diffusion-ext."""

import gc
import sys

# What torch has made by now stays until the end: looking through it for garbage took 0.08 s of
# the 0.2 s that a command starts in.
gc.freeze()

from .app.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
