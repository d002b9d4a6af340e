"""The documents' Python runs as it stands, links lead somewhere, no public name is missing."""

import pathlib
import re
import sys

import pytest
from PIL import Image

import diffusion_ext as dx
from diffusion_ext.app import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "release")]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]


def blocks(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def run(document, names=None):
    """The names that the document's Python leaves, run from top to bottom."""
    names = {} if names is None else names
    for block in blocks(document):
        exec(block, names)
    return names


def test_readme_runs_from_top_to_bottom(capsys):
    pytest.importorskip("diffusers")
    names = run("README.md")
    assert "torch.Size([4, 3, 16, 16])" in capsys.readouterr().out
    assert names["image"].size == (16, 16)
    assert names["loss"].isfinite()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


@pytest.fixture
def photos(monkeypatch, tmp_path):
    """A folder to work in, with the run that docs/getting-started.md has trained by then."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 32), colour).save(f"photos/{name}/0.png")
    train = "train --data photos/ --size 32 --n-feat 8 --epochs 1"
    assert cli.main(train.split()) == 0


@pytest.mark.usefixtures("photos")
def test_getting_started_runs_from_top_to_bottom():
    pytest.importorskip("diffusers")
    names = run("docs/getting-started.md")
    assert names["image"].size == (16, 16)
    assert names["result"].images.shape == (4, 3, 16, 16)
    assert names["cats"].tolist() == [0] * 8
    with Image.open("cats.png") as picture:
        assert picture.width > picture.height  # two rows of four


def test_drop_in_runs_from_top_to_bottom(capsys):
    pytest.importorskip("diffusers")
    names = run("docs/drop-in.md")
    assert "tensor(True)" in capsys.readouterr().out
    assert names["x"].isfinite().all()
    assert names["noisy"].shape == names["clean"].shape


def test_training_runs_from_top_to_bottom(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    names = run("docs/training.md")
    assert (tmp_path / "runs" / "unet" / "checkpoint.safetensors").exists()
    assert names["cats"].images.shape == (4, 3, 16, 16)
    assert names["loss"].isfinite()


def test_what_tables_and_noise_say(capsys):
    run("docs/tables.md")
    assert capsys.readouterr().out == "[500 333 167]\n(3, 7)\n"
    run("docs/noise.md")
    assert capsys.readouterr().out == "True\n"


def test_samplers_runs_from_top_to_bottom(capsys):
    names = run("docs/samplers.md")
    assert capsys.readouterr().out == "True\n"
    assert names["images"].shape == (4, 3, 16, 16)


def test_all_python_of_the_documents_is_run():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    have = {str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text()}
    here = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert [page for page in have if f'run("{page}"' not in here] == []


def test_the_samplers_that_are_added_are_ddim_and_ipndm(capsys):
    names, schedule = run("docs/adding.md"), dx.NoiseSchedule.linear(100)
    assert capsys.readouterr().out == "torch.Size([2, 3, 8, 8])\n"
    for ours, theirs in (
        (names["my_sampler"](schedule, 7), dx.ddim(schedule, 7)),
        (names["my_multistep"](schedule, 7), dx.ipndm(schedule, 7, order=2)),
    ):
        assert abs(ours.weights - theirs.weights).max() < 1e-14


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    """Of those that the documentation's own build does not check."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_public_name_is_in_the_reference():
    from public_types import public_names

    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    written = set(re.findall(r"^::: \S+\.(\w+)$", pages, re.M)) | set(
        re.findall(r"^\* `(\w+)`$", pages, re.M)
    )
    names = {name.rpartition(".")[2] for name in public_names()}
    assert names - written == set()
    assert len(names) > 90
