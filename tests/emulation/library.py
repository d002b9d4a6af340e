"""The libraries of kernels on the emulated GPU (csrc/emulation/device.h)."""

import os
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILT = pathlib.Path(os.environ.get("DIFFUSION_EXT_EMULATED", ROOT / "build" / "emulated"))


def path_of(name: str) -> pathlib.Path:
    """NAME.so; without it the tests that need it are skipped, or fail where it is required."""
    path = BUILT / f"{name}.so"
    if not path.exists():
        required = os.environ.get("DIFFUSION_EXT_REQUIRE_EMULATED") == "1"
        (pytest.fail if required else pytest.skip)("not built: make emulated")
    return path


def load(name: str) -> None:
    torch.ops.load_library(str(path_of(name)))
