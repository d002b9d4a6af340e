"""The variants of the CUDA kernels, and what is made of their times."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import variants, winners  # noqa: E402

FACTS = {"device": "Some GPU", "torch": "2", "CUDA": "13", "driver": "1", "date": "today"}


def test_every_variant_changes_the_header():
    today = variants.HEADER.read_text()
    names = set()
    for variant in variants.VARIANTS:
        text = variants.header_with(dict(variant.changes))
        assert (text == today) == (variant.name == winners.AS_IT_IS)
        for constant, value in variant.changes:
            assert f"{constant} = {value}" in text
        assert text.count("\n") == today.count("\n")
        names.add(variant.library)
    assert len(names) == len(variants.VARIANTS)


def test_a_constant_that_is_not_there():
    with pytest.raises(ValueError, match="has 0 constants kNothing"):
        variants.header_with({"kNothing": "1"})


def norm_row(us, backward=False, layout="contiguous", plan="on chip"):
    return {
        "op": variants.NORM, "work": "group_norm_act", "variant": "forward", "shape": [2, 32, 8, 8],
        "layout": layout, "backward": backward, "plan": plan, "us": us,
    }  # fmt: skip


@pytest.fixture
def report(tmp_path):
    return winners.TuneReport(tmp_path, FACTS)


def test_a_constant_wins_by_the_works_that_it_is_about(report):
    report.rows = [
        norm_row({"as_it_is": 10, "512x1": 8, "lanes_2": 9.9}),
        norm_row({"as_it_is": 10, "512x1": 12, "lanes_2": 5}, layout="channels_last"),
        # Forward and backward: the backward itself takes 20, and 30 with the variant.
        norm_row({"as_it_is": 30, "512x1": 38, "lanes_2": 29.9}, backward=True),
    ]
    (constant,) = report.winners()
    won = report.winners()[constant]
    assert (constant, won["value"], won["variant"]) == ("kForward", "{512, 1, 4}", "512x1")
    assert won["ratio"] == pytest.approx(0.8)
    assert "constexpr Norm kForward = {512, 1, 4};" in report.header()
    assert "constexpr Norm kForwardLast = {256, 2, 4};" in report.header()
    assert "// Measured on: Some GPU (torch 2, CUDA 13, driver 1), today.\n" in report.header()
    assert report.lines() == ["kForward = {512, 1, 4} takes 0.80 of today's time (512x1)"]


def test_a_gain_within_the_noise_wins_nothing(report):
    report.rows = [norm_row({"as_it_is": 100, "512x1": 99})]
    assert report.winners() == {}
    assert report.lines() == ["no constant won 2 %: tuning.h stays as it is"]


def test_where_another_plan_is_faster(report):
    report.rows = [norm_row({"as_it_is": 10, "split_always": 7})]
    assert report.winners() == {}  # no constant for every shape
    assert report.lines()[-1] == (
        "group_norm_act, forward, 2×32×8×8, contiguous, on chip was chosen, "
        "but split_always takes 0.70 of its time"
    )


def test_what_is_wrong_comes_first(report):
    report.failures = ["FAILED 512x1: off"]
    report.rows = [norm_row({"as_it_is": 10, "256x1": 5})]
    report.write()
    assert {path.name for path in report.folder.iterdir()} == {"tune.json", "tune.md"}
    assert json.loads((report.folder / "tune.json").read_text())["failures"] == report.failures
    found = (report.folder / "tune.md").read_text().partition("## Found\n\n")[2]
    assert found.startswith(f"* FAILED 512x1: off\n* {report.lines()[0]}\n")


def test_a_loss_is_no_forward_and_backward_of_a_norm(report):
    """Nothing is taken out of its time."""
    us = {"as_it_is": 10, "grid_4": 5}
    row = norm_row(us, backward=True) | {"op": variants.ELEMENTWISE, "variant": "v, noise made"}
    report.rows = [row]
    assert report.winners()["kElementBlocks"]["ratio"] == pytest.approx(0.5)
