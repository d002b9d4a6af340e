"""dx.load: from what a run has left to a network and all that is needed to sample from it."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import SCHEDULE, TinyNetwork, tiny_data, tiny_trainer
from torch import nn

import diffusion_ext as dx
from diffusion_ext.nn.loading import ABOUT_KEY
from diffusion_ext.training import (
    ImageData,
    StateDictOptions,
    TrainedModel,
    Trainer,
    TrainingConfig,
    load_trained,
    save_state_dict,
)

NAMES = ("cat", "dog", "7", "elk")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four classes, whose network has none of the defaults."""
    images = tiny_data(8).images
    data = ImageData(images, torch.arange(8) % 4, NAMES)
    network = dx.nn.ContextUnet(1, 8, 4, 4, norm="group", shortcut="zero")
    config = TrainingConfig(epochs=2, batch_size=4, prediction="v", seed=7)
    trainer = Trainer(network, SCHEDULE, data, tmp_path_factory.mktemp("runs") / "pets", config)
    trainer.fit(progress=False)
    return trainer


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def assert_is(found: TrainedModel, run: Trainer):
    assert same_weights(found.model, run.ema_model)
    assert found.model.configuration == run.model.configuration
    assert not found.model.training
    assert np.array_equal(found.schedule.beta, SCHEDULE.beta)
    assert np.array_equal(found.schedule.alpha_bar, SCHEDULE.alpha_bar)
    assert found.class_names == NAMES
    assert found.prediction == "v"
    assert found.shape == (1, 4, 4)
    assert found.config["batch_size"] == 4


def test_a_folder_and_its_checkpoint(run):
    folder = run.folder.path
    for path in (folder, str(folder), folder / "checkpoint.safetensors"):
        assert_is(dx.load(path), run)


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_exported_weights_tell_the_rest(run, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    save_state_dict(dx.load(run.folder.path), path)
    assert_is(dx.load(path), run)
    assert dx.nn.load_context_unet(path).configuration == run.model.configuration
    state = load_file(path) if suffix == "safetensors" else torch.load(path)
    plain = dx.nn.ContextUnet(1, 8, 4, 4, norm="group")
    assert str(plain.load_state_dict(state, strict=True)) == "<All keys matched successfully>"


def test_options_choose_another_schedule_than_the_file(run, tmp_path):
    path = tmp_path / "model.pth"
    save_state_dict(dx.load(run.folder.path), path)
    found = dx.load(path, StateDictOptions(schedule="cosine", timesteps=50, shortcut="scaled"))
    assert np.array_equal(found.schedule.alpha_bar, dx.NoiseSchedule.cosine(50).alpha_bar)
    assert found.class_names == NAMES
    assert found.model.options["shortcut"] == "scaled"


def test_another_number_of_steps_wants_another_schedule(run, tmp_path):
    path = tmp_path / "model.pth"
    save_state_dict(dx.load(run.folder.path), path)
    with pytest.raises(ValueError, match="timesteps: wanted 20, those of the file's schedule, or"):
        dx.load(path, StateDictOptions(timesteps=100))
    assert_is(dx.load(path, StateDictOptions(timesteps=20)), run)


@pytest.mark.parametrize("wrong", [None, 3, TinyNetwork()])
def test_what_is_no_path(wrong):
    with pytest.raises(TypeError, match="run: wanted the path of a run or of weights, got"):
        dx.load(wrong)


def test_a_network_alone_tells_its_options(tmp_path):
    network = dx.nn.ContextUnet(1, 8, 2, 28, shortcut="random", pool_window=7)
    save_state_dict(network, tmp_path / "model.safetensors")
    found = dx.load(tmp_path / "model.safetensors")
    assert found.model.configuration == network.configuration
    assert found.class_names == ("0", "1")
    assert np.array_equal(found.schedule.alpha_bar, dx.NoiseSchedule.course(500).alpha_bar)
    with pytest.raises(ValueError, match="model: wanted a ContextUnet, got TinyNetwork"):
        save_state_dict(TinyNetwork(), tmp_path / "model.safetensors")


def test_the_last_weights_in_place_of_the_averaged(run):
    last = dx.load(run.folder.path, averaged=False)
    assert same_weights(last.model, run.model)
    assert not same_weights(last.model, run.ema_model)


def test_labels(run):
    found = dx.load(run.folder.path)
    assert found.labels(["dog", "cat", "dog"]).tolist() == [1, 0, 1]
    assert found.labels("elk").tolist() == [3]
    assert found.labels([3, "3", 0]).tolist() == [3, 3, 0]
    assert found.labels("7").tolist() == [2]  # a name
    assert found.labels([]).dtype == torch.int64
    for numbers in (torch.tensor([1, 0]), np.array([1, 0]), [np.int64(1), 0]):
        assert found.labels(numbers).tolist() == [1, 0]
    assert found.labels(np.int64(3)).tolist() == [3]
    for wrong in (4, -1, "4"):
        with pytest.raises(ValueError, match="7, cat, dog, elk, or a number from 0 to 3, got"):
            found.labels(wrong)
    with pytest.raises(ValueError, match=r"got Dgo; did you mean dog\?$"):
        found.labels("Dgo")


def test_a_long_list_of_classes_is_cut():
    names = tuple(f"class{i:04d}" for i in range(1000))
    with pytest.raises(ValueError, match="class0019 and 980 more, or a number from 0 to 999"):
        TrainedModel(TinyNetwork(), SCHEDULE, names).labels("none")
    with pytest.raises(ValueError, match="classes: this network has none, got 'cat'"):
        TrainedModel(TinyNetwork(), SCHEDULE, ()).labels("cat")


def test_a_network_of_ones_own(tmp_path):
    config = TrainingConfig(epochs=1, batch_size=5)
    run = Trainer(TinyNetwork(), SCHEDULE, tiny_data(), tmp_path, config)
    run.fit(progress=False)
    with pytest.raises(ValueError, match=r"hand one over, as in dx\.load\(path, model=network\)"):
        dx.load(tmp_path)
    found = dx.load(tmp_path, model=TinyNetwork())
    assert same_weights(found.model, run.ema_model)
    with pytest.raises(ValueError, match="shape: TinyNetwork has no in_channels and height"):
        assert found.shape
    with pytest.raises(
        ValueError, match=r"the weights are of ContextUnet\(1, 8, 2, 4, norm='batch"
    ):
        dx.load(tiny_run(tmp_path / "other"), model=dx.nn.ContextUnet(1, 8, 2, 4, norm="group"))


def tiny_run(folder):
    tiny_trainer(folder, TrainingConfig(epochs=1, batch_size=5)).fit(progress=False)
    return folder


@pytest.mark.parametrize("wanted", [{"averaged": False}, {"model": TinyNetwork()}])
def test_weights_alone_are_of_one_kind(run, tmp_path, wanted):
    save_state_dict(run.ema_model, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"they are of a checkpoint; .*model\.pth has weights alo"):
        dx.load(tmp_path / "model.pth", **wanted)


@pytest.mark.parametrize(
    "about",
    ["[]", '{"model": 3}', "no JSON", '{"schedule": {"beta": [0.1]}}', '{"class_names": 3}',
     '{"schedule": {"beta": [0, 2], "alpha_bar": "x"}}', '{"training": 1}', '{"schedule": [1]}',
     '{"model": {"width": 3}}', '{"model": {"n_feat": 65536}}'],
)  # fmt: skip
def test_a_description_that_lies(tmp_path, about):
    path = tmp_path / "model.safetensors"
    save_file(dx.nn.ContextUnet(1, 8, 2, 4).state_dict(), path, {ABOUT_KEY: about})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        dx.load(path)


def test_a_description_of_another_kind_in_a_pickle(tmp_path):
    state = dx.nn.ContextUnet(1, 8, 2, 4).state_dict()
    for metadata in ({}, 3, {"": 3}):
        state._metadata = metadata
        torch.save(state, tmp_path / "model.pth")
        assert dx.load(tmp_path / "model.pth").class_names == ("0", "1")
    for about in (3, json.dumps([1]), "no JSON"):
        state._metadata = {"": {ABOUT_KEY: about}}
        torch.save(state, tmp_path / "model.pth")
        for load in (dx.load, dx.nn.load_context_unet):
            with pytest.raises(ValueError, match=r"model\.pth has no description of a network"):
                load(tmp_path / "model.pth")


def test_a_run_or_a_file_that_is_not_there(run, monkeypatch):
    monkeypatch.chdir(run.folder.path.parents[1])
    runs = run.folder.path.parent.name
    with pytest.raises(FileNotFoundError, match=rf"^run: no file or folder {runs}/pest; did you m"):
        dx.load(f"{runs}/pest")
    for wrong in ("pets/checkpoint.safetensor", "pets/checkpont.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"mean .*pets/checkpoint\.safetensors\?$"):
            dx.load(f"{runs}/{wrong}")
    with pytest.raises(
        FileNotFoundError, match=rf"no checkpoint.safet.* in {runs}; there are .*pets"
    ):
        dx.load(runs)
    with pytest.raises(
        FileNotFoundError, match="`diffusion-ext train` writes one: name the folder"
    ):
        dx.load("nowhere")


def test_weights_alone_are_no_run(run):
    exported = run.folder.path / "model.pth"
    save_state_dict(run.ema_model, exported)
    with pytest.raises(ValueError, match=r"is not a diffusion_ext .*; did you mean .*/pets\?$"):
        dx.training.load_checkpoint(exported)
    exported.unlink()


def test_a_damaged_checkpoint_is_called_one(run, tmp_path):
    content = bytearray((run.folder.path / "checkpoint.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: its content is not"):
        dx.load(tmp_path)


def test_the_import_is_light_and_knows_the_name():
    code = (
        "import sys, diffusion_ext as dx; assert 'load' in dir(dx)\n"
        "assert not any(name.startswith('diffusion_ext.training') for name in sys.modules)\n"
        "from diffusion_ext.training import load_trained; assert dx.load is load_trained"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dx.load is load_trained
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        assert dx.lode


def test_samples_of_a_named_class(run):
    """What docs/getting-started.md does, on the exported weights as on the run."""
    found, picture = dx.load(run.folder.path), io.BytesIO()
    table = dx.dpmpp_2m(found.schedule, steps=3, prediction=found.prediction)
    labels = found.labels(["dog"] * 4)
    drawn = dx.sample(found.model, (4, *found.shape), table, context=labels, progress=False)
    from diffusion_ext.sampling.pictures import sample_grid

    sample_grid(drawn.images, columns=2).save(picture, "PNG")
    assert picture.tell() > 100
