"""What the documents state of the code is what the code does."""

import math
import pathlib
import re
import sys

import pytest

from diffusion_ext import _C

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out


def test_the_plans_in_kernels_md():
    rows = re.findall(
        r"^\| ([\d×]+) \| ([\d.]+) \| (.+) \|$", (DOCS / "kernels.md").read_text(), re.M
    )
    assert len(rows) == 12
    for sizes, megabytes, cells in rows:
        shape = [int(size) for size in sizes.split("×")]
        assert float(megabytes) == round(2 * math.prod(shape) / 1e6, 1)
        said = []
        for channels_last in (False, True):
            for backward in (False, True):
                plan = _C.group_norm_plan(
                    shape, 32, 2, channels_last=channels_last, backward=backward
                )
                blocks = f", {plan['parts']} blocks" if plan["parts"] > 1 else ""
                split = f"split, {plan['parts']} parts"
                said.append(split if plan["kind"] == "split" else f"on chip{blocks}")
        assert cells.split(" | ") == said, sizes


def test_the_predictions_in_kernels_md():
    pytest.importorskip("diffusers")
    from benchmarks.gpu import amdahl

    text = (DOCS / "kernels.md").read_text()
    for gpu in amdahl.GPUS:
        _, of_gpu = text.split(f"| network, on an {gpu.name} |")
        for row in amdahl.rows(amdahl.works()[::3], gpu):  # the others take longer
            assert f"| {' | '.join(row)} |\n" in of_gpu
