"""release/torch_releases.py: which releases it tries, and what it writes into docs/install.md."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "release"))

import torch_releases as releases  # noqa: E402

PAGE = releases.PAGE.read_text()


def test_the_newest_of_each_minor_version():
    index = ["2.15.0", "2.14.1", "2.14.0", "2.13.0+cpu", "2.13.0", "2.10.0", "2.9.1", "1.13.1"]
    assert releases.newest_of_each(index, "2.10") == ["2.10.0", "2.13.0", "2.14.1", "2.15.0"]
    assert releases.oldest() == "2.10"


@pytest.mark.parametrize(
    "torch, devices, has_cuda, expected",
    [
        ("2.13.0+cpu (no CUDA)", "cpu", False, ("no CUDA", "right")),
        ("2.13.0 (no CUDA)", "cpu", True, ("no CUDA", "right; there is no CUDA to load it")),
        ("2.11.0 (CUDA 13.0)", "cpu and cuda", True, ("CUDA 13.0", "right, and loaded")),
        ("2.9 (CUDA 12.8)", "cpu", True, ("CUDA 12.8", "right; its CUDA library is not loaded")),
    ],
)
def test_what_smoke_says(torch, devices, has_cuda, expected):
    said = f"a warning\ndiffusion_ext 0.1.0, torch {torch}, Python 3.11.7: {devices} loaded, "
    assert releases.result(said + "results right; CPU native (avx2)\n", has_cuda) == expected


def test_what_went_wrong_is_a_cell():
    assert releases.result("Traceback\nperturb differs\n", True) == ("", "wrong: perturb differs")


def test_the_page_can_be_written_again():
    """As it is, where a row brings nothing new."""
    assert releases.with_row(PAGE, "2.13.0", ["", "", ""]) == PAGE


def test_a_row_that_was_tried():
    """Its cells are new, those that were not tried stay, and so do the other rows and the text."""
    before, cells = PAGE.splitlines(), ["CUDA 9.0", "right (2030-01-01)", ""]
    after = releases.with_row(PAGE, "2.13.0", cells).splitlines()
    (changed,) = set(after) - set(before)
    (replaced,) = set(before) - set(after)
    assert changed.startswith("| 2.13.0 (CUDA 9.0) | right (2030-01-01) | ")
    assert changed.split(" | ")[2] == replaced.split(" | ")[2]
    more = releases.with_row(PAGE, "2.9.1", cells).splitlines()
    assert "| 2.9.1 (CUDA 9.0) | right (2030-01-01) |  |" in more
    assert [line for line in more if "2.9.1" not in line] == before


def test_a_page_without_a_table():
    with pytest.raises(ValueError, match=r"install\.md: wanted the lines <!-- written by"):
        releases.with_row("no table", "2.13.0", ["", "", ""])
