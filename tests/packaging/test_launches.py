"""What a launch asks of CUDA, where there is nvcc, on GPUs that are made up."""

import pathlib
import shlex
import subprocess
import sys

import pytest
from test_build import ROOT
from toolkit import Toolkit
from torch.utils.cpp_extension import include_paths, library_paths

sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu.variants import header_with

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def program(tmp_path):
    """launches.cu, with tuning that lets launches overlap."""
    try:
        toolkit = Toolkit()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tuning, program = tmp_path / "tuning.h", tmp_path / "launches"
    tuning.write_text(header_with({"kOverlapLaunches": "true"}))
    flags = shlex.split((ROOT / "csrc" / "flags_cuda.txt").read_text())
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    torch = library_paths()[0]
    link = ["-cudart", "none", f"-L{torch}", "-ltorch_cpu", "-lc10", "-Xlinker", f"-rpath={torch}"]
    command = [toolkit.nvcc, *flags, "-arch=sm_90", "-include", tuning, *headers, *link]
    sources = HERE / "launches.cu", HERE / "made_up_gpus.cpp"
    subprocess.run([*command, *sources, "-o", program], check=True)
    return program


def test_launches(program):
    """Code for GPUs before sm_90 does not wait for the launch before it, on none of them. Shared
    memory is asked for once for each of the two kernels, on each GPU, in whichever thread."""
    out = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout
    asked, overlaps = zip(*map(str.split, out.splitlines()), strict=True)
    assert asked == ("2", "2", "2")
    assert overlaps == ("0", "1", "0")
