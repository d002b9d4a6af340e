"""What the documents state of the code is what the code does."""

import math
import pathlib
import re

from diffusion_ext import _C

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


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
