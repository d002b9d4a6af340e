"""Networks of which each process holds a part (FSDP2), and their checkpoints."""

import json
import pickle
import re
import signal

import pytest
from malice import Evil
from many_processes import (
    EPOCHS,
    TINY,
    assert_close_weights,
    begin,
    run,
    run_script,
    wait_for_step,
)

from diffusion_ext.training import TrainingConfig, load_checkpoint, read_log

ADAM = ("--optimizer", "AdamW", "--learning-rate", "0.002", "--warmup", "3")


def test_sharded_processes_train_the_same(tmp_path, images, alone):
    done = run(2, "train", "--data", images, "--out", tmp_path, *TINY, *EPOCHS, "--shard")
    assert done.returncode == 0, done.stderr
    assert_close_weights(alone, tmp_path)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-000006.png", "step-000012.png"
    ]  # fmt: skip
    assert not list(tmp_path.glob("sharded-*"))  # one file has it all at the end
    assert json.loads((tmp_path / "config.json").read_text())["model"]["class"] == "ContextUnet"
    norms = [[r["gradient_norm"] for r in read_log(f / "log.csv")] for f in (alone, tmp_path)]
    for one, other in zip(*norms, strict=True):
        assert (one == other == "") or float(one) == pytest.approx(float(other), rel=1e-4)


def test_interrupted_and_resumed_by_others(tmp_path, images):
    """Cut in two, then in three, then whole: the optimizer's moments come along."""
    train = ("train", "--data", images, *TINY, *ADAM)
    whole = run(None, *train, "--out", tmp_path / "whole", "--epochs", 25)
    assert whole.returncode == 0, whole.stderr
    parts = (*train, "--out", tmp_path / "parts")
    process = begin(2, *parts, "--epochs", 25, "--shard")
    wait_for_step(tmp_path / "parts", 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=40)
    assert process.returncode != 0, output
    kept = sorted(p.name for p in (tmp_path / "parts").glob("sharded-*"))
    assert 1 <= len(kept) <= 2
    assert not (tmp_path / "parts" / "checkpoint.safetensors").exists()
    process = begin(3, *parts, "--epochs", 25, "--shard", "--resume")
    wait_for_step(tmp_path / "parts", int(kept[-1][-8:]) + 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=40)
    assert process.returncode != 0, output
    done = run(None, *parts, "--epochs", 25, "--resume")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "parts").glob("sharded-*"))
    one, other = (
        load_checkpoint(tmp_path / folder / "checkpoint.safetensors")
        for folder in ("whole", "parts")
    )
    assert one.steps == other.steps
    # AdamW moves a weight whose gradient is all rounding by whole steps, so the losses tell.
    assert one.losses == pytest.approx(other.losses, rel=2e-2)
    assert one.optimizer.keys() == other.optimizer.keys()


SIZES = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
import torch.distributed as dist
from small_runs import SCHEDULE, tiny_data
import diffusion_ext as dx
from diffusion_ext.training import Trainer, TrainingConfig
from diffusion_ext.training.sharding import local
dist.init_process_group("gloo")
config = TrainingConfig(epochs=1, batch_size=4, shard=True)
torch.manual_seed(dist.get_rank())  # other weights in each process, unless they are the first's
model = dx.nn.ContextUnet(1, 8, 2, 4, norm="group")
first = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
run = Trainer(model, SCHEDULE, tiny_data(), {folder!r}, config)
begun = run.checkpoint()
if dist.get_rank() == 0:
    assert all(torch.equal(begun.model[name], first[name]) for name in first)
    assert all(torch.equal(begun.ema[name], first[name]) for name in first)
run.fit(progress=False)
state = run.learner.state()
shares = [
    sum(local(t).numel() for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    for tensors in (state["model"], state["ema"], state["optimizer"])
]
print("shares", *shares, flush=True)
dist.destroy_process_group()
"""


def test_each_process_holds_its_part_of_the_first_ones_weights(tmp_path):
    done = run_script(2, SIZES, tmp_path)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"0\.\d+", done.stdout)
    assert len(shares) == 6
    assert all(0.45 < float(share) < 0.55 for share in shares)


def test_a_damaged_part_is_named(tmp_path, images):
    train = ("train", "--data", images, "--out", tmp_path, *TINY, "--epochs", 40, "--shard")
    process = begin(2, *train)
    wait_for_step(tmp_path, 8, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=40)
    before, last = sorted(tmp_path.glob("sharded-*"))
    part = sorted(last.glob("*.distcp"))[0]
    part.write_bytes(part.read_bytes()[:100])
    done = run(None, *train, "--resume")
    assert done.returncode == 2
    assert f"checkpoint: {last} is damaged" in done.stderr
    assert f"the one before it is {before}: resume from it" in done.stderr
    evil, metadata = tmp_path / "was-run", last / ".metadata"
    metadata.write_bytes(pickle.dumps(Evil(evil), protocol=2))
    done = run(None, *train, "--resume")
    assert done.returncode == 2
    assert "posix.mkdir is refused" in done.stderr
    assert not evil.exists()
    done = run(None, *train, "--resume-from", before)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("sharded-*"))
    assert (tmp_path / f"replaced-{last.name}").is_dir()  # what came after is set aside


def test_float16_is_not_for_shards():
    with pytest.raises(ValueError, match="precision: wanted bfloat16 or float32 with shard, got"):
        TrainingConfig(shard=True, precision="float16")
