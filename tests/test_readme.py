"""The documents' Python runs as it stands."""

import pathlib
import re

import pytest

import diffusion_ext as dx
from diffusion_ext import samplers

ROOT = pathlib.Path(__file__).resolve().parents[1]


def blocks(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_readme_runs_from_top_to_bottom(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("README.md"):
        exec(block, names)
    assert "torch.Size([4, 3, 16, 16])" in capsys.readouterr().out
    assert names["x_t"].shape == names["target"].shape == (4, 3, 16, 16)
    assert (tmp_path / "runs" / "small" / "checkpoint.safetensors").exists()
    assert names["digits"].images.shape == (10, 1, 8, 8)


def test_drop_in_runs_from_top_to_bottom(capsys):
    pytest.importorskip("diffusers")
    names = {}
    for block in blocks("docs/drop-in.md"):
        exec(block, names)
    assert "tensor(True)" in capsys.readouterr().out
    assert names["x"].isfinite().all()
    assert names["noisy"].shape == names["clean"].shape


def test_training_runs_from_top_to_bottom(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("docs/training.md"):
        exec(block, names)
    assert (tmp_path / "runs" / "unet" / "checkpoint.safetensors").exists()
    assert names["cats"].images.shape == (4, 3, 16, 16)
    assert names["loss"].isfinite()


def test_the_samplers_of_contributing_are_ddim_and_ipndm():
    names, schedule = dict(vars(samplers)), dx.NoiseSchedule.linear(100)
    for block in blocks("CONTRIBUTING.md"):
        exec(block, names)
    for ours, theirs in (
        (names["my_sampler"](schedule, 7), dx.ddim(schedule, 7)),
        (names["my_multistep"](schedule, 7), dx.ipndm(schedule, 7, order=2)),
    ):
        assert abs(ours.weights - theirs.weights).max() < 1e-14


def test_every_link_leads_somewhere():
    for document in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
        assert all((ROOT / link).exists() for link in links)
    assert len(re.findall(r"\]\(csrc/", (ROOT / "README.md").read_text())) >= 8
