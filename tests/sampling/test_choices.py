"""Choices that were measured once: kept, found again, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.ops import choices
from diffusion_ext.ops.measuring import Measured

CPU = torch.device("cpu")
MEASURED = Measured(
    {"a": 0.25, "b": 0.002}, {"c": "is not here"}, time.time(), 12.25, 5, spread=0.031, waited=0.0
)


def kept(of="work", detail="small", taken="b"):
    return choices.keep(of, detail, CPU, taken, MEASURED)


def test_found_again():
    choice = kept()
    assert choices.find("work", "small", CPU) == choice
    assert choice.taken == "b"
    assert str(choice) == "b 2 ms; a 250 ms; c: is not here"
    assert choices.find("work", "large", CPU) is None
    assert choices.find("other work", "small", CPU) is None
    assert kept(taken="a") == choices.find("work", "small", CPU) != choice


def test_info_tells():
    kept(), kept("another")
    assert [choice.of for choice in dx.info().choices] == ["another", "work"]
    assert "    work\n      b 2 ms; a 250 ms" in str(dx.info())
    day = time.strftime("%Y-%m-%d", time.localtime(MEASURED.when))
    assert f"      measured {day} " in str(dx.info())
    how = "in 12.2 s, 5 rounds; the best turns of a way differ by 3%, no core for 0% of the time"
    assert f"{how}\n" in str(dx.info())
    assert str(choices.folder()) in str(dx.info())


def test_of_this_machine_alone(monkeypatch):
    kept()
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert choices.find("work", "small", CPU) is None
    assert dx.info().choices == ()
    with dx.use_backend("reference"):
        kept()
    assert choices.find("work", "small", CPU) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"of": "work"}', "null", "\x00", '{"seconds": 1}'],
)
def test_damaged_files_are_measured_again(text):
    kept()
    (file,) = choices.folder().iterdir()
    file.write_text(text)
    assert choices.find("work", "small", CPU) is None
    assert dx.info().choices == ()
    assert choices.find("work", "small", CPU) is None
    assert kept() == choices.find("work", "small", CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": {}}, {"seconds": {"b": "fast"}}, {"seconds": ["b"]}, {"failed": {"c": 1}},
        {"failed": None}, {"taken": "c"}, {"taken": []}, {"of": 3}, {"machine": []},
        {"machine": {}}, {"more": 1}, {"when": "today"}, {"spread": None}, {"rounds": []},
    ],
)  # fmt: skip
def test_a_file_of_other_things_is_no_choice(change):
    kept()
    (file,) = choices.folder().iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert choices.find("work", "small", CPU) is None
    assert dx.info().choices == ()


@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_choices_of_a_device_that_is_not_here(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is here")
    kept()
    (file,) = choices.folder().iterdir()
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"machine": found["machine"] | {"device": device}}))
    assert dx.info().choices == ()


def test_without_a_folder_to_write(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("DIFFUSION_EXT_CACHE", str(file / "below"))
    assert kept().taken == "b"
    assert choices.find("work", "small", CPU) is None
    assert dx.info().choices == ()


def test_where(monkeypatch, tmp_path):
    assert str(choices.folder()) == os.environ["DIFFUSION_EXT_CACHE"]
    monkeypatch.delenv("DIFFUSION_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices.folder() == tmp_path / "diffusion_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert choices.folder() == Path.home() / ".cache" / "diffusion_ext"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert choices.folder() == Path(tempfile.gettempdir()) / "diffusion_ext"


@pytest.mark.parametrize("doubt", [{"spread": 0.3}, {"waited": 0.2}])
def test_what_is_in_doubt_is_not_found_again(doubt):
    kept()
    doubtful = choices.keep("other work", "small", CPU, "a", dataclasses.replace(MEASURED, **doubt))
    assert doubtful.taken == "a"
    assert choices.find("other work", "small", CPU) is None
    assert choices.find("work", "small", CPU) is not None
    assert [choice.of for choice in dx.info().choices] == ["other work", "work"]
    assert str(dx.info()).count("in doubt, so no file keeps it") == 1
    kept("other work")
    assert "in doubt" not in str(dx.info())
