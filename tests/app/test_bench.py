"""`bench`: what it times, how it bounds what it waits for, and the figures that it shows."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from diffusion_ext.app import cli
from diffusion_ext.app.bench import diffusers_folder, turns
from diffusion_ext.app.bench import subject as bench_subject
from diffusion_ext.app.bench.report import Result, written
from diffusion_ext.app.bench.subject import RANDOM_WEIGHTS, RUNTIMES, WAYS, Request
from diffusion_ext.app.bench.turns import GIB, Process, Way, measured, receive, time_all
from diffusion_ext.app.bench.worker import NAMES, Ready, subject
from diffusion_ext.nn import ContextUnet
from diffusion_ext.sampling.runtimes import missing
from diffusion_ext.training import save_state_dict

UNET = {
    "sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
}  # fmt: skip
CONDITIONED = {
    **UNET, "cross_attention_dim": 8, "attention_head_dim": 4, "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
}  # fmt: skip
XL = {
    **CONDITIONED, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 5,
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_state_dict(ContextUnet(3, n_feat=8, n_cfeat=3, height=8), path)
    return path


def pipeline(folder, weights=False, **parts):
    """A folder as diffusers saves one: name -> (class name, its options)."""
    diffusers = pytest.importorskip("diffusers")
    folder.mkdir(exist_ok=True)
    index = {"_class_name": "DiffusionPipeline"}
    for name, (class_name, options) in parts.items():
        made = getattr(diffusers, class_name)(**options)
        (made.save_pretrained if weights else made.save_config)(folder / name)
        index[name] = ["diffusers", class_name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


# --- what is timed --------------------------------------------------------------------------------


def outputs(model, way, **options):
    with torch.no_grad():
        parts = subject(Request(str(model), way, steps=3, **options)).parts
        return {part.name: part.call() for part in parts}


def assert_the_ways_agree(model, way="ours", **options):
    eager, other = (outputs(model, name, **options) for name in ("eager", way))
    assert eager.keys() == other.keys()
    for name, output in eager.items():
        torch.testing.assert_close(other[name], output, rtol=1e-4, atol=1e-4)


def test_a_context_unet(checkpoint):
    assert_the_ways_agree(checkpoint, batch=2)
    of = subject(Request(str(checkpoint), "ours", batch=2, steps=3))
    assert of.shape == (2, 3, 8, 8)
    assert [(p.name, p.uses, p.per_call) for p in of.parts] == [
        ("network", 3, 1),
        ("sampler", 3, 3),
    ]
    names = {"model": ContextUnet(3, 8, 3, 8), "context": torch.eye(3)[:2]}
    exec("import diffusion_ext as dx; schedule = dx.NoiseSchedule.linear()", names)
    exec("\n".join(of.advice), names)
    assert names["result"].images.shape == of.shape


@pytest.mark.parametrize(
    "unet, doubled",
    [(("UNet2DModel", {**UNET, "in_channels": 4, "out_channels": 4}), False),
     (("UNet2DModel", {**UNET, "in_channels": 4, "out_channels": 4, "num_class_embeds": 2}), False),
     (("UNet2DConditionModel", CONDITIONED), True), (("UNet2DConditionModel", XL), True)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:__array__")
def test_a_pipeline_of_diffusers(tmp_path, unet, doubled):
    heun = ("HeunDiscreteScheduler", {})
    folder = pipeline(tmp_path / "p", unet=unet, vae=("AutoencoderKL", VAE), scheduler=heun)
    assert_the_ways_agree(folder)
    of = subject(Request(str(folder), "eager", steps=3))
    # Heun's method of three steps calls the network five times.
    assert [(part.name, part.uses) for part in of.parts] == [
        ("network", 5), ("sampler", 5), ("decoder", 1),
    ]  # fmt: skip
    assert of.shape == (1, 3, 32, 32)
    assert len(of.parts[0].call()) == (2 if doubled else 1)
    assert "pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)" in of.advice
    smaller = subject(Request(str(folder), "eager", steps=3, size=16))
    assert smaller.shape == (1, 3, 16, 16)
    assert smaller.parts[2].call().shape == (1, 3, 16, 16)


@pytest.mark.compiles
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_runtimes(tmp_path, checkpoint, runtime):
    if lacking := missing(runtime):
        pytest.skip(f"wants {lacking}")
    assert_the_ways_agree(checkpoint, runtime, batch=2)
    parts = {"unet": ("UNet2DConditionModel", XL), "vae": ("AutoencoderKL", VAE)}
    folder = pipeline(tmp_path / "p", **parts, scheduler=("DDIMScheduler", {}))
    assert_the_ways_agree(folder, runtime)


def test_its_weights_where_they_are_there(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = pipeline(tmp_path / "p", weights=True, unet=("UNet2DModel", UNET))
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    found = subject(Request(str(folder / "unet"), "eager"))
    assert found.notes == []
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found.parts[0].call(), unet(x, 500).sample)
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert subject(Request(str(folder / "unet"), "eager")).notes == [RANDOM_WEIGHTS]


@pytest.mark.filterwarnings("ignore:__array__")
def test_noise_of_a_scheduler_is_the_same_in_each_way(tmp_path):
    assert_the_ways_agree(
        pipeline(tmp_path / "p", scheduler=("EulerAncestralDiscreteScheduler", {})) / "scheduler"
    )


def test_half_precision(tmp_path):
    folder = pipeline(tmp_path / "p", vae=("AutoencoderKL", VAE))
    decoded = outputs(folder / "vae", "ours", dtype="bfloat16")["decoder"]
    assert (decoded.dtype, decoded.shape) == (torch.bfloat16, (1, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_is_built_in_is_known_to_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    for component in diffusers_folder.components(name).values():
        cls = getattr(diffusers, component.class_name)
        options = {k: v for k, v in component.config.items() if not k.startswith("_")}
        with torch.device("meta"):
            made = cls(**options)
        assert all(made.config[k] == v for k, v in options.items())


def test_stable_diffusions_size():
    diffusers = pytest.importorskip("diffusers")
    found = diffusers_folder.components("stable-diffusion")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(found["unet"].config)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "model: no file or folder nowhere; wanted one, or context-unet,"),
        (["contextunet"], "stable-diffusion; did you mean context-unet?"),
        (["--batch", "0"], "batch: wanted at least 1, got 0"),
        (["--seconds", "0.5"], "seconds: wanted at least 1, got 0.5"),
        (["--size", "7"], "height: wanted a positive multiple of 4, got 7"),
        (["stable-diffusion", "--size", "100"], "size: wanted a multiple of 8, got 100"),
    ],
)
def test_user_errors(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path / "page.html")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_of_train(tmp_path, checkpoint):
    """Its folder has a config.json, as diffusers' have."""
    (tmp_path / "config.json").write_text(json.dumps({"training": {}}))
    shutil.copy(checkpoint, tmp_path / "checkpoint.safetensors")
    assert subject(Request(str(tmp_path), "eager")).title == "ContextUnet, n_feat 8"


def test_a_size_that_the_checkpoint_has_not(checkpoint):
    with pytest.raises(ValueError, match=r"size: wanted 8, the checkpoint's, got 16"):
        subject(Request(str(checkpoint), "eager", size=16))


def test_a_network_that_is_not_known(tmp_path):
    other = ("PriorTransformer", {"num_layers": 1, "num_attention_heads": 1})
    folder = pipeline(tmp_path / "p", prior=other, scheduler=("DDIMScheduler", {}))
    with pytest.raises(ValueError, match=r"model: wanted a UNet2DModel .* got .*PriorTransformer"):
        subject(Request(str(folder), "eager"))


# --- how it is timed ------------------------------------------------------------------------------


@pytest.mark.compiles
def test_the_whole_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ["bench", str(checkpoint), "--steps", "3", "--seconds", "1800", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    (network,) = (line for line in printed.splitlines() if line.startswith("network"))
    ways = len([way for way in WAYS if way not in RUNTIMES or not missing(way)])
    assert len(network.split()) == 2 + 2 * ways
    assert "diffusion_ext is " in printed
    assert printed.count("its results differ from eager's by") == ways - 1
    text = out.read_text()
    assert text.count('<div class="bar') == ways
    assert "optimize_for_sampling(model, batch=2)" in text


def test_a_way_that_is_not_ready_in_time_is_left_out(checkpoint):
    ways = measured(Request(str(checkpoint), "eager", steps=3), seconds=0.5)
    assert ways["eager"].times["network"]
    assert ways["ours"].times["network"]
    assert not ways["compile"].times
    assert ways["compile"].failure == "no time was left for it, --seconds gives it some"


def test_a_runtime_that_is_not_installed_is_said_so(checkpoint, monkeypatch):
    monkeypatch.setattr(bench_subject, "missing", lambda runtime: runtime)
    ways = measured(Request(str(checkpoint), "eager", steps=3), seconds=0.5)
    wanted = 'not installed: pip install "diffusion_ext[openvino]" brings it'
    assert (ways["openvino"].failure, ways["openvino"].times) == (wanted, {})


def test_a_process_that_dies_is_told(checkpoint):
    process = Process(Request(str(checkpoint), "eager"))
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="its process ended: killed, as for lack of memory"):
        process.received()
    process.end()


def begins_a_compiler_and_dies(connection):
    """As `serve`, of a way whose compiler outlives it."""
    os.setsid()
    compiler = subprocess.Popen(["sleep", "100"])
    connection.recv()
    connection.send(compiler.pid)
    os._exit(3)


def test_what_a_way_has_begun_ends_with_it(monkeypatch):
    monkeypatch.setattr(turns, "serve", begins_a_compiler_and_dies)
    process = Process("anything")
    compiler = pathlib.Path(f"/proc/{process.connection.recv()}")
    with pytest.raises(RuntimeError, match="its process ended: status=3"):
        process.received()
    assert compiler.exists()
    process.end()
    deadline = time.monotonic() + 10
    while compiler.exists() and "Z" not in (compiler / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_way_that_dies_while_it_is_timed_is_left_out():
    class Timed:
        def timed(self, part, seconds):
            return [0.5]

    class Dying(Timed):
        asked = 0

        def timed(self, part, seconds):
            self.asked += 1
            if self.asked > 3:
                raise RuntimeError("its process ended")
            return [0.1]

    ways = {name: way(name, 1, 1) for name in ("eager", "ours")}
    time_all(ways, {"eager": Timed(), "ours": Dying()}, until=0)
    assert ways["eager"].best("network") == 0.5
    time_all(ways, {"eager": Timed(), "ours": Dying()}, until=float("inf"))
    assert (ways["ours"].times, ways["ours"].failure) == ({}, "its process ended")


def test_what_eager_torch_cannot_run_is_an_error():
    class Dead:
        def received(self):
            raise RuntimeError("its process ended")

    with pytest.raises(ValueError, match="model: torch itself cannot run it here: its process"):
        receive(Way("eager"), Dead())
    ours = Way("ours")
    receive(ours, Dead())
    assert ours.failure == "its process ended"


# --- what is shown --------------------------------------------------------------------------------


def way(name, network, sampler, output=1.0):
    parts = [("network", 10), ("sampler", 10)]
    drawn = [np.array([output, 2])]
    ready = Ready("Net", (2, 3, 8, 8), ["line <1>"], ["Note."], parts, drawn, 1.0, GIB)
    return Way(name, ready, times={"network": [9, network], "sampler": [sampler, 9]})


def test_the_figures(tmp_path):
    ways = {
        "eager": way("eager", 0.3, 0.1),
        "compile": Way("compile", failure="not ready in 9 s"),
        "ours": way("ours", 0.1, 0.06, output=1.5),
    }
    result = Result(Request("x", "eager", batch=2, steps=10), ways)
    assert result.rows() == [
        ["network", "10", "300 ms", "100 ms"],
        ["sampler", "10", "100 ms", "60 ms"],
        ["a picture, all calls", "", "2 s", "800 ms"],  # a batch has two
        ["diffusion_ext's gain", "", "2.50x", "1.00x"],
    ]
    text = result.text()
    assert "Net: 2 pictures of 3x8x8, 10 steps" in text
    assert "diffusion_ext is 2.50x as fast as eager.\n" in text
    assert "torch.compile: not ready in 9 s." in text
    assert "differ from eager's by 0.2 of the largest value" in text  # 0.5 of 2, in one digit
    result.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "width: 100.0%" in page
    assert "width: 40.0%" in page
    assert "line &lt;1&gt;" in page
    record = json.loads((tmp_path / "page.json").read_text())
    assert record["seconds"]["ours"] == {"network": 0.1, "sampler": 0.06, "picture": 0.8}
    assert record["calls"] == {"network": 10, "sampler": 10}


def test_the_page_says_which_way_is_the_fastest(tmp_path):
    ways = {
        "eager": way("eager", 0.3, 0.1),
        "openvino": way("openvino", 0.05, 0.1),
        "onnxruntime": Way("onnxruntime", failure="not installed"),
        "ours": way("ours", 0.1, 0.1),
    }
    result = Result(Request("x", "eager", batch=2, steps=10), ways)
    wanted = (
        "diffusion_ext is 2.00x as fast as eager, 0.75x as fast as OpenVINO. "
        "OpenVINO is the fastest here."
    )
    assert result.verdict() == wanted
    advice = '# OpenVINO is faster here; where dx.sample makes the pictures, engine="auto" takes'
    assert advice in result.text()
    assert "ONNX Runtime: not installed." in result.text()
    result.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert wanted in page
    assert '<div class="bar openvino"><span>OpenVINO</span>' in page
    assert (
        json.loads((tmp_path / "page.json").read_text())["seconds"]["openvino"]["picture"] == 0.75
    )


def test_ours_may_fail():
    ways = {"eager": way("eager", 1, 1), "ours": Way("ours", failure="why")}
    result = Result(Request("x", "eager", batch=2), ways)
    assert result.verdict() == "diffusion_ext could not run it: why"


def test_written():
    assert [written(s) for s in (12.34, 1.0, 0.01234, 9.876e-6)] == [
        "12.3 s", "1 s", "12.3 ms", "9.88 us",
    ]  # fmt: skip
