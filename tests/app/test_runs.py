"""Runs, checkpoints and exported weights, given to the commands as their first argument."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_ext as dx
from diffusion_ext.app import cli
from diffusion_ext.sampling.pictures import to_levels

NAMES = ("cat", "dog", "elk")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to work in, with a run of three classes in runs/photos."""
    home = tmp_path_factory.mktemp("home")
    random = np.random.default_rng(0)
    for name in NAMES:
        (home / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(home / "photos" / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train = "train --data photos --size 8 --n-feat 8 --timesteps 10 --epochs 1 --batch-size 6"
        assert cli.main(train.split()) == 0
    return home


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def run(capsys, line):
    """(status, what it printed, its error)"""
    status = cli.main(line.split())
    streams = capsys.readouterr()
    return status, streams.out, streams.err.removeprefix("diffusion-ext: ").strip()


@pytest.mark.parametrize("given", ["runs/photos", "runs/photos/checkpoint.safetensors"])
@pytest.mark.parametrize("old", ["", "--checkpoint "])
def test_sample(tmp_path, capsys, given, old):
    line = f"sample {old}{given} --per-class 1 --steps 2 --out {tmp_path}"
    status, printed, _ = run(capsys, line)
    assert status == 0
    assert f"page        {tmp_path}/samples.html" in printed
    page = (tmp_path / "samples.html").read_text()
    assert f"Samples of {given}" in page


def test_sample_writes_into_the_run(capsys):
    assert run(capsys, "sample runs/photos --per-class 1 --steps 2")[0] == 0
    with Image.open("runs/photos/samples.png") as picture:
        assert picture.width > 50


def table_of(trained):
    return dx.dpmpp_2m_sde(trained.schedule, 2, clip=1.0, prediction=trained.prediction)


def drawn_by_hand(labels, per_class):
    trained = dx.load("runs/photos")
    model = trained.model.to(memory_format=torch.channels_last)
    context = torch.tensor(labels).repeat_interleave(per_class)
    table = table_of(trained)
    shape = (len(context), *trained.shape)
    return dx.sample(model, shape, table, context, guidance_scale=2.0, progress=False).images


@pytest.mark.parametrize("classes", [("elk", "cat"), ("2", "0"), ("elk", "0")])
def test_some_classes_by_name_and_by_number(tmp_path, classes):
    sample = cli.Sample("runs/photos", tmp_path, classes=classes, per_class=2, steps=2)
    images, labels, _ = sample.draw()
    assert labels.tolist() == [2, 2, 0, 0]
    assert torch.equal(images, drawn_by_hand([2, 0], 2))


def test_classes_on_the_command_line(tmp_path, capsys):
    line = f"sample runs/photos --classes elk 0 --per-class 2 --steps 2 --out {tmp_path}"
    assert run(capsys, line)[0] == 0
    with Image.open(tmp_path / "samples.png") as some:
        assert run(capsys, line.replace(" --classes elk 0", ""))[0] == 0
        with Image.open(tmp_path / "samples.png") as all_of_them:
            assert some.height < all_of_them.height  # two rows, and three


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_set_of_some_classes(tmp_path, capsys, kind):
    line = f"sample runs/photos --count 5 --batch 4 --steps 2 --format {kind} --out {tmp_path}"
    assert run(capsys, f"{line} --classes elk cat")[0] == 0
    if kind == "npz":
        with np.load(tmp_path / "samples-000000000.npz") as part:
            assert part["labels"].tolist() == [2, 0, 2, 0]
            trained = dx.load("runs/photos")
            drawn = dx.sample(
                trained.model.to(memory_format=torch.channels_last), (4, *trained.shape),
                table_of(trained), torch.tensor([2, 0, 2, 0]), 2.0, progress=False,
            )  # fmt: skip
            assert (part["images"] == to_levels(drawn.images)).all()
    else:
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["cat", "elk"]
        cats = sorted(path.name for path in (tmp_path / "cat").iterdir())
        assert cats == ["000000001.png", "000000003.png"]
    assert json.loads((tmp_path / "samples.json").read_text())["chosen"] == [2, 0]
    status, _, error = run(capsys, line)
    assert status == 2
    assert "are of another chosen: wanted None, got [2, 0]; choose another folder" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--classes dgo", "classes: wanted cat, dog, elk, or a number from 0 to 2, got dgo; did you"
                          " mean dog?"),
        ("--classes cat 3", "classes: wanted cat, dog, elk, or a number from 0 to 2, got 3"),
    ],
)  # fmt: skip
def test_classes_that_there_are_not(capsys, line, message):
    assert run(capsys, f"sample runs/photos {line}")[::2] == (2, message)


def test_a_run_after_the_classes(capsys):
    assert run(capsys, "sample --classes cat runs/photos")[::2] == (
        2,
        "classes: runs/photos is a run, which comes before the options: "
        "diffusion-ext sample runs/photos --classes ...",
    )


def test_export_goes_beside_the_run_and_back(tmp_path, capsys):
    status, printed, _ = run(capsys, "export runs/photos")
    assert status == 0
    assert printed == (
        "state dict  runs/photos/model.safetensors, of ContextUnet(3, 8, 3, 8, norm='group', "
        "shortcut='scaled', pool_window=2)\n"
        "in Python   dx.load('runs/photos/model.safetensors')\n"
    )
    exported = dx.load("runs/photos/model.safetensors")
    assert exported.class_names == NAMES
    pictures = []
    for given in ("runs/photos", "runs/photos/model.safetensors"):
        line = f"sample {given} --classes dog --per-class 2 --steps 2 --out {tmp_path}"
        assert run(capsys, line)[0] == 0
        pictures.append((tmp_path / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_exported_weights_where_a_run_is_wanted(capsys):
    assert run(capsys, "export runs/photos --out runs/photos/model.pth")[0] == 0
    resume = "train --data photos --size 8 --n-feat 8 --timesteps 10 --out runs/photos"
    for line in ("evaluate", f"{resume} --resume-from"):
        status, _, error = run(capsys, f"{line} runs/photos/model.pth")
        assert status == 2
        assert "model.pth is not a diffusion_ext checkpoint" in error
        assert error.endswith("; did you mean runs/photos?")


@pytest.mark.parametrize("command", ["sample", "export", "evaluate"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/phtos", "no file or folder runs/phtos; did you mean runs/photos?"),
        ("photos", "no checkpoint.safetensors in photos; did you mean runs/photos?"),
        ("runs", "no checkpoint.safetensors in runs; there are runs/photos"),
        ("", "no file or folder runs/digits; there are runs/photos"),
    ],
)
def test_a_run_that_is_not_there(capsys, command, given, message):
    assert run(capsys, f"{command} {given}")[::2] == (2, f"run: {message}")


def test_other_commands_that_take_a_run(home, tmp_path, capsys):
    status, _, error = run(capsys, "train --data photos --size 8 --init-from runs/phtos --out x")
    assert (status, error) == (2, "run: no file or folder runs/phtos; did you mean runs/photos?")
    status, _, error = run(capsys, f"bench {home}/runs/phtos --out {tmp_path / 'bench.html'}")
    assert status == 2
    assert error.endswith(f"; did you mean {home}/runs/photos?")
    status, _, error = run(capsys, "train --data photos --out runs/photos/checkpoint.safetensors")
    assert (status, error) == (
        2,
        "folder: wanted a run's, got the file runs/photos/checkpoint.safetensors; did you mean "
        "runs/photos?",
    )


def test_a_run_is_resumed_from_its_own_folder(capsys):
    line = "train --data photos --size 8 --n-feat 8 --timesteps 10 --epochs 1 --batch-size 6"
    assert run(capsys, f"{line} --out runs/photos --resume-from runs/photos")[0] == 0
