"""`train --resume`: the options of the run in the folder, but for those given anew."""

import json

import numpy as np
import pytest

import diffusion_ext as dx
from diffusion_ext.app import cli
from diffusion_ext.training import Trainer, TrainingConfig, load_checkpoint, load_data

SMALL = ["--n-feat", "8", "--timesteps", "20", "--batch-size", "4", "--steps", "6"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    np.save(folder / "set.npy", values)
    return folder / "set.npy"


@pytest.fixture
def run(photos, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", "--data", str(photos), "--out", str(folder), *SMALL]) == 0
    capsys.readouterr()
    return folder


def steps(folder):
    return load_checkpoint(folder / "checkpoint.safetensors").steps


def test_the_options_are_those_of_the_run(run, capsys):
    assert cli.main(["train", "--out", str(run), "--resume", "--steps", "9"]) == 0
    told = capsys.readouterr().out
    assert "steps       9, before 6\n" in told
    assert "training on 10 images 3x8x8" in told
    assert steps(run) == 9
    record = json.loads((run / "config.json").read_text())
    assert record["training"]["batch_size"] == 4
    assert record["options"]["schedule"] == "cosine"


def test_a_new_length_in_epochs(run):
    assert cli.main(["train", "--out", str(run), "--resume", "--epochs", "4"]) == 0
    assert steps(run) == 12
    assert cli.main(["train", "--out", str(run), "--resume", "--steps", "13"]) == 0
    assert steps(run) == 13
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0  # nothing is left to do
    assert steps(run) == 13


def test_the_whole_command_again_is_the_same_run(run, photos):
    again = ["train", "--data", str(photos), "--out", str(run), *SMALL[:-1], "8", "--resume"]
    assert cli.main(again) == 0
    assert steps(run) == 8


def test_from_one_of_the_checkpoints(run):
    (earlier,) = run.glob("checkpoint-*.safetensors")
    assert cli.main(["train", "--out", str(run), "--resume-from", str(earlier)]) == 0
    assert steps(run) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--batch-size", "5"], "batch_size: the run in {} has 4, which stays, got 5; "),
        (["--n-feat", "16"], "n_feat: the run in {} has 8, which stays, got 16; "),
        (["--schedule", "linear"], "schedule: the run in {} has cosine, which stays, got"),
        (["--timesteps", "30"], "timesteps: the run in {} has 20, which stays, got 30; "),
        (["--size", "16"], "size: the run in {} has None, which stays, got 16; "),
        (["--prediction", "flow"], "prediction: the run in {} has v, which stays, got flow"),
    ],
)
def test_what_a_run_has_to_keep(run, capsys, change, message):
    assert cli.main(["train", "--out", str(run), "--resume", *change]) == 2
    told = capsys.readouterr()
    assert message.format(run) in told.err
    assert told.out == ""
    assert steps(run) == 6


def test_the_data_may_have_moved(run, photos, capsys):
    moved = photos.rename(photos.with_name("moved.npy"))
    options = ["--resume", "--steps", "7"]
    assert cli.main(["train", "--out", str(run), *options]) == 2
    assert str(photos) in capsys.readouterr().err
    assert cli.main(["train", "--out", str(run), *options, "--data", str(moved)]) == 0
    assert f"data        {moved}, before {photos}\n" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path), "--resume"]) == 2
    file = tmp_path / "config.json"
    assert f"resume: wanted {file}, which `train` writes; there is none" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_of_an_earlier_version(photos, tmp_path, schedule):
    """Its config.json has no options, and its length in epochs."""
    out = tmp_path / "old"
    train = ["train", "--data", str(photos), "--out", str(out), "--schedule", schedule]
    assert cli.main([*train, *SMALL, "--prediction", "epsilon"]) == 0
    record = json.loads((out / "config.json").read_text())
    del record["options"], record["training"]["steps"], record["training"]["timestep_sampling"]
    record["training"] |= {"epochs": 2, "timestep_sampling": "logit-normal"}
    (out / "config.json").write_text(json.dumps(record))
    assert cli.main(["train", "--out", str(out), "--resume", "--epochs", "3"]) == 0
    assert steps(out) == 9
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "10"]) == 0
    assert steps(out) == 10


def test_a_run_that_python_goes_on_with_stays_trains(run):
    """What config.json says of the data stays in it."""
    before = json.loads((run / "config.json").read_text())
    data = load_data(before["data"]["data"])
    model = dx.nn.ContextUnet(**{n: before["model"][n] for n in before["model"] if n != "class"})
    config = TrainingConfig(**before["training"] | {"steps": 7})
    schedule = dx.NoiseSchedule.cosine(20)
    Trainer(model, schedule, data, run, config).fit(resume=True, progress=False)
    assert cli.main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 0
    assert steps(run) == 8


def test_a_run_that_python_began(run, capsys):
    record = json.loads((run / "config.json").read_text())
    del record["data"]
    (run / "config.json").write_text(json.dumps(record))
    for command in (["train", "--resume", "--out"], ["evaluate"]):
        assert cli.main([*command, str(run)]) == 2
        assert "does not tell where the data came from" in capsys.readouterr().err


def test_a_network_to_start_from_tells_what_it_predicts(run, photos, tmp_path, capsys):
    start = ["train", "--data", str(photos), "--init-from", str(run), *SMALL[4:]]
    assert cli.main([*start, "--out", str(tmp_path / "tuned")]) == 0
    tuned = load_checkpoint(tmp_path / "tuned" / "checkpoint.safetensors")
    before = load_checkpoint(run / "checkpoint.safetensors")
    assert tuned.training["prediction"] == before.training["prediction"] == "v"
    np.testing.assert_array_equal(tuned.schedule.alpha_bar, before.schedule.alpha_bar)
    assert cli.main(["train", "--out", str(tmp_path / "tuned"), "--resume", "--steps", "7"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "schedule", "prediction"),
    [
        ([], "cosine", "v"),
        (["--noising", "course"], "course", "epsilon"),
        (["--schedule", "linear", "--prediction", "epsilon"], "linear", "epsilon"),
    ],
)
def test_what_a_run_is_trained_for(photos, tmp_path, options, schedule, prediction):
    out = tmp_path / "out"
    assert cli.main(["train", "--data", str(photos), "--out", str(out), *SMALL, *options]) == 0
    record = json.loads((out / "config.json").read_text())
    assert record["options"]["schedule"] == schedule
    assert record["training"]["prediction"] == prediction
