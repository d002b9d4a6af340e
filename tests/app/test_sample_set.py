"""Samples in files: the same ones by any number of processes, after any kill, for `evaluate`."""

import json
import os
import signal
import time

import numpy as np
import pytest
from many_processes import TINY, begin, run, workers_of, write_images
from PIL import Image

from diffusion_ext.app import cli
from diffusion_ext.app.sample_set import SampleSet, read_samples
from diffusion_ext.training.evaluation import features


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "set.npz", 300)
    short = ["--epochs", 2, "--samples-every", 0]
    train = ["train", "--data", images, "--out", folder / "run", *TINY, *short]
    assert run(None, *train).returncode == 0
    return folder / "run"


@pytest.fixture
def quick_judge(monkeypatch):
    monkeypatch.setattr(features, "STEPS", 5)


def draw(trained, out, *options):
    return ["sample", trained, "--out", out, "--steps", 3, "--batch", 8, *options]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """Folders of 30 samples drawn by one process, as arrays and as pictures."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("npz", "png")}
    for kind, folder in folders.items():
        assert run(None, *draw(trained, folder, "--count", 30, "--format", kind)).returncode == 0
    return folders


@pytest.mark.parametrize(("count", "kind"), [(2, "npz"), (3, "png")])
def test_any_number_of_processes_draws_the_same_files(tmp_path, trained, alone, count, kind):
    done = run(count, *draw(trained, tmp_path, "--count", 30, "--format", kind))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(alone[kind])
    assert done.stdout.count("samples     30 in") == 1


def test_the_files(trained, alone):
    names = list(files_of(alone["npz"]))
    assert names == ["samples-000000000.npz", "samples-000000008.npz", "samples-000000016.npz",
                     "samples-000000024.npz", "samples.json"]  # fmt: skip
    with np.load(alone["npz"] / "samples-000000024.npz") as last:
        assert last["images"].shape == (6, 8, 8, 3)
        assert last["images"].dtype == np.uint8
        assert last["numbers"].tolist() == list(range(24, 30))
        assert last["labels"].tolist() == [i % 3 for i in range(24, 30)]
        sixth = last["images"][1]
    assert (np.asarray(Image.open(alone["png"] / "1" / "000000025.png")) == sixth).all()
    assert len(list(alone["png"].glob("[012]/*.png"))) == 30
    assert json.loads((alone["npz"] / "samples.json").read_text())["batch"] == 8


def test_more_samples_join_those_that_are_there(tmp_path, trained, alone):
    for count in (5, 13, 30):
        assert cli.main([str(a) for a in draw(trained, tmp_path, "--count", count)]) == 0
    assert files_of(tmp_path) == files_of(alone["npz"])


def test_killed_and_resumed(tmp_path, trained):
    many = draw(trained, tmp_path / "parts", "--count", 2000)
    process = begin(2, *many)
    end = time.monotonic() + 60
    while len(list((tmp_path / "parts").glob("*.npz"))) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert 5 <= len(list((tmp_path / "parts").glob("*.npz"))) < 250
    assert run(3, *many).returncode == 0
    assert run(None, *draw(trained, tmp_path / "whole", "--count", 2000)).returncode == 0
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("of", "option"), [("sampler: wanted {", ("--guidance", 3)), ("engine", ("--engine", "trace"))]
)
def test_samples_of_another_kind_are_not_mixed(tmp_path, trained, capsys, of, option):
    assert cli.main([str(a) for a in draw(trained, tmp_path, "--count", 3)]) == 0
    other = draw(trained, tmp_path, "--count", 3, *option)
    assert cli.main([str(a) for a in other]) == 2
    assert f"are of another {of}" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("kind", ["npz", "png"])
def test_evaluate_takes_them(tmp_path, trained, alone, kind):
    measure = ["evaluate", trained, "--samples", alone[kind], "--out", tmp_path]
    assert cli.main([str(a) for a in measure]) == 0
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["images"] == 30
    assert numbers["recognised"] is not None
    assert numbers["sampler"]["steps"] == 3


@pytest.mark.usefixtures("quick_judge")
def test_evaluate_takes_pictures_of_any_origin(tmp_path, trained, alone):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in alone["png"].rglob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    images, labels = read_samples(folder, (3, 8, 8), ("0", "1", "2"))
    assert labels is None
    expected, of_expected = read_samples(alone["npz"], (3, 8, 8), ("0", "1", "2"))
    assert (images == expected).all()
    assert of_expected.tolist() == [i % 3 for i in range(30)]
    measure = ["evaluate", trained, "--samples", folder, "--out", tmp_path / "report"]
    assert cli.main([str(a) for a in measure]) == 0
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["recognised"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", 0), "count: wanted at least 1, got 0"),
        (("--count", 4, "--batch", 0), "batch: wanted at least 1, got 0"),
    ],
)
def test_bad_options(tmp_path, trained, capsys, options, message):
    assert cli.main([str(a) for a in draw(trained, tmp_path, *options)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_wanted(trained, capsys):
    assert cli.main(["sample", str(trained), "--count", "3"]) == 2
    assert "out: wanted a folder for the samples of --count" in capsys.readouterr().err


def test_other_images_are_not_samples(tmp_path, alone):
    with pytest.raises(ValueError, match=r"wanted 8-bit images \[3, 16, 16\], got uint8 \[3, 8, 8"):
        read_samples(alone["npz"], (3, 16, 16), ())
    with pytest.raises(FileNotFoundError, match="samples: no folder"):
        read_samples(tmp_path / "none", (3, 8, 8), ())
    with pytest.raises(ValueError, match="no pictures in"):
        read_samples(tmp_path, (3, 8, 8), ())


def test_a_class_that_cannot_be_a_folder(tmp_path):
    for name in ("../outside", "", ".."):
        with pytest.raises(ValueError, match=r"a class called '.*' cannot be a folder"):
            SampleSet(tmp_path / "set", (name,), pictures=True, chosen=(0,)).begin({})
    assert not (tmp_path / "set").exists()
