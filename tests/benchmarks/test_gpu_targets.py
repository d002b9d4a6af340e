"""benchmarks/gpu/targets.py asks of rows where noise is made what the GPU at hand can reach."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import targets  # noqa: E402

H200 = 132 * 4 * 1.98e9  # instructions of warps a second


def row(op, variant, passes, dtype, issue_rate=H200, terabytes=4.3):
    size = 2048 * 4 * 64 * 64 * (4 if dtype == "float32" else 2)
    copy = 1e6 * 2 * size / (1e12 * terabytes)
    return {
        "op": op, "variant": variant, "passes": passes, "dtype": dtype, "scale": "large",
        "bytes": passes * size, "issue_rate": issue_rate, "backward": False,
        "device_us": {"copy": copy, "fused": passes / 2 * copy, "eager": 10 * copy},
    }  # fmt: skip


@pytest.mark.parametrize(
    "op, variant, passes, dtype, share",
    [
        ("sampler_step", "DDPM, noise made", 3, "float32", 0.85),  # 373 of 425
        ("sampler_step", "DDPM, noise made", 3, "bfloat16", 0.5),  # 373 of 744
        ("sampler_step", "DDPM, noise given", 4, "bfloat16", 1),
        ("denoising_loss", "epsilon, noise made", 2, "float32", 0.35),  # 249 of 680
        ("perturb", "noise made", 3, "float32", 1),
    ],
)
def test_instructions_bound_what_can_be_reached(op, variant, passes, dtype, share):
    assert targets.reachable(row(op, variant, passes, dtype)) == pytest.approx(share)


def test_a_device_whose_clock_is_not_known_is_bound_by_memory():
    assert targets.reachable(row("sampler_step", "DDPM, noise made", 3, "float32", None)) == 1


def test_targets_of_the_loss():
    found = targets.of_row(row("denoising_loss", "epsilon, noise made", 2, "bfloat16"))
    wanted = {target["target"]: target["wanted"] for target in found}
    assert wanted == {
        "denoising_loss: epsilon, noise made, bfloat16: % of copy": "≥ 25",
        "denoising_loss: epsilon, noise made, bfloat16: × eager": "≥ 0.575",
    }
    assert all(target["met"] for target in found)
