"""Works of large networks: each row in a process of its own, checked there, timed beside eager."""

import dataclasses
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks import apart, diffusers_networks, suite  # noqa: E402
from benchmarks.work import Implementation  # noqa: E402

pytest.importorskip("diffusers")


def unet():
    """The tiny UNet2DConditionModel, and a row of wrong results."""
    work = next(
        work
        for work in suite.works("diffusers_forward", quick=True)
        if work.op == "UNet2DConditionModel"
    )
    wrong = Implementation(lambda *_: lambda x, text: 2 * x)
    return dataclasses.replace(work, implementations=work.implementations | {"wrong": wrong})


def test_rows_are_checked_and_timed():
    rows = apart.Apart(["ours", "eager", "wrong"], 0.01, unet)
    for name in ("ours", "eager"):
        _, error = rows.checked(name)
        assert error < 1e-4
        assert len(rows.rounds(name).seconds) >= apart.TURNS
    with pytest.raises(AssertionError, match="above"):
        rows.checked("wrong")


def test_a_row_that_is_not_there_is_an_error_of_its_own():
    rows = apart.Apart(["nobody", "eager"], 0.01, unet)
    assert len(rows.rounds("eager").seconds) >= apart.TURNS
    with pytest.raises(AssertionError, match="KeyError: 'nobody'"):
        rows.checked("nobody")


def test_stable_diffusions_unet_is_in_the_suite():
    (network,) = [n for n in diffusers_networks.WHOLE if n.apart]
    assert (network.input, network.text) == ((2, 4, 64, 64), (77, 768))
    assert network.bytes == 4 * 859_520_964
    names = [
        name for work, name in suite.rows("diffusers_forward", quick=False)
        if work.op == "UNet2DConditionModel"
    ]  # fmt: skip
    wanted = {"eager", "compiled, frozen", "OpenVINO", "ONNX Runtime", "ours"}
    assert wanted <= set(names)
