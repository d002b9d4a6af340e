"""These tests are of the stand-in itself: they run in a process on it (make gpu-tests)."""

import sys

if "stand_in_gpu" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]
