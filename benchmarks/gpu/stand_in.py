"""Whether the stand-in for a GPU (tests/stand_in) is what runs: everything is small then."""

import os

STAND_IN = os.environ.get("GPU_CHECK_STAND_IN") == "1"  # as gpu_check.py says
