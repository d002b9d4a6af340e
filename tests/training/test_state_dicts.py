"""State dicts on the command line: the course's are sampled and fine-tuned, ours go back to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import diffusion_ext as dx
from benchmarks import source
from diffusion_ext.app.cli import main
from diffusion_ext.training import (
    StateDictOptions,
    TrainingConfig,
    load_checkpoint,
    load_trained,
    save_state_dict,
)

HEIGHT, CLASSES = 16, 5


@pytest.fixture
def course(tmp_path):
    """A checkpoint as the course's notebook writes one, and its network."""
    torch.manual_seed(0)
    network = source.ContextUnet(3, n_feat=16, n_cfeat=CLASSES, height=HEIGHT).eval()
    path = tmp_path / "model_31.pth"
    torch.save(network.state_dict(), path)
    return network, path


def array(path, count=12):
    pixels = np.random.default_rng(0).integers(0, 256, (count, HEIGHT, HEIGHT, 3), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % CLASSES)
    return str(path)


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_the_courses_checkpoint_is_its_network(course, tmp_path, suffix):
    network, path = course
    if suffix != "pth":
        path = tmp_path / f"model.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(network.state_dict(), path)
    trained = load_trained(path, StateDictOptions(shortcut="scaled"))
    inputs = torch.randn(2, 3, HEIGHT, HEIGHT), torch.rand(2), torch.randn(2, CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(trained.model(*inputs), network(*inputs), rtol=1e-4, atol=1e-4)
    assert trained.class_names == ("0", "1", "2", "3", "4")
    assert np.array_equal(trained.schedule.alpha_bar, dx.NoiseSchedule.course(500).alpha_bar)
    assert load_trained(path).model.options == {
        "norm": "batch", "shortcut": "zero", "pool_window": 4
    }  # fmt: skip


def test_options_and_what_the_file_tells(tmp_path):
    model = dx.nn.ContextUnet(1, 8, 3, 28, norm="group", pool_window=7)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    options = StateDictOptions("cosine", 100, "random", 7)
    trained = load_trained(tmp_path / "x.pth", options)
    assert trained.model.configuration == model.configuration | {"shortcut": "random"}
    assert np.array_equal(trained.schedule.alpha_bar, dx.NoiseSchedule.cosine(100).alpha_bar)
    assert load_trained(tmp_path / "x.pth").model.options["pool_window"] == 4  # as the course's
    small = dx.nn.ContextUnet(1, 8, 3, 8)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    assert load_trained(tmp_path / "small.pth").model.options["pool_window"] == 2


def test_the_command_line_samples_it(course, tmp_path, capsys):
    _, path = course
    options = ["--per-class", "1", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["sample", str(path), *options]) == 0
    assert (tmp_path / "out" / "samples.png").exists()
    assert "samples" in capsys.readouterr().out
    quirks = ["--timesteps", "100", "--schedule", "linear", "--shortcut", "random"]
    assert main(["sample", str(path), *options, *quirks]) == 0
    assert main(["sample", str(path), *options, "--pool-window", "1"]) == 2
    assert "pool_window" in capsys.readouterr().err


def test_it_is_fine_tuned_and_goes_back_to_the_notebook(course, tmp_path):
    network, path = course
    run, exported = tmp_path / "run", tmp_path / "tuned.pth"
    train = ["train", "--data", array(tmp_path / "x.npz"), "--out", str(run), "--epochs", "1"]
    train += ["--batch-size", "6", "--schedule", "course", "--noising", "course"]
    train += ["--shortcut", "zero", "--init-from", str(path), "--learning-rate", "1e-9"]
    assert main(train) == 0
    checkpoint = load_checkpoint(run / "checkpoint.safetensors")
    assert checkpoint.training["noising"] == "course"
    assert checkpoint.model_configuration["shortcut"] == "zero"
    for name, tensor in checkpoint.model.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, network.state_dict()[name], rtol=0, atol=1e-6)

    assert main(["export", str(run), "--out", str(exported)]) == 0
    notebook = source.ContextUnet(3, n_feat=16, n_cfeat=CLASSES, height=HEIGHT)
    notebook.load_state_dict(torch.load(exported), strict=True)
    averaged = checkpoint.build_model()
    for name, tensor in notebook.state_dict().items():
        assert torch.equal(tensor, averaged.state_dict()[name])
    # A checkpoint of ours is a start too.
    again = [*train[:3], "--out", str(tmp_path / "again"), *train[5:], "--init-from", str(run)]
    assert main(again) == 0


def test_noising_is_checked_and_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"noising: wanted one of .*, got 'none'"):
        TrainingConfig(noising="none")


def test_data_that_does_not_fit_the_weights(course, tmp_path, capsys):
    _, path = course
    arguments = ["train", "--init-from", str(path), "--out", str(tmp_path / "run")]
    data = tmp_path / "x.npz"
    np.savez(data, images=np.zeros((4, 8, 8, 3), np.uint8), labels=[0, 1, 2, 4])
    assert main([*arguments, "--data", str(data)]) == 2
    assert "wanted images ['N', 3, 16, 16] for this model" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1)}, "no init_conv.conv1.0.weight"),
        ([1, 2], "wanted a state dict"),
        (Malicious(), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_state_dict(tmp_path, capsys, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(b"no archive") if content is None else torch.save(content, path)
    assert main(["sample", str(path)]) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert "ran" not in streams.out
    with pytest.raises(ValueError, match="out: wanted a file ending in one of"):
        save_state_dict(dx.nn.ContextUnet(1, 8, 3, 8), tmp_path / "x.onnx")
