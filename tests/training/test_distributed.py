"""Training in several processes that torchrun starts: the same run, whatever happens to them."""

import os
import re
import signal
import socket
import time

import pytest
from many_processes import (
    EPOCHS,
    TINY,
    assert_close_weights,
    assert_same_weights,
    begin,
    run,
    run_script,
    wait_for_step,
    workers_of,
)

from diffusion_ext.training import load_checkpoint, read_log

LONG = ("--epochs", "40")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes_trains_the_same(tmp_path, images, alone, count):
    done = run(count, "train", "--data", images, "--out", tmp_path, *TINY, *EPOCHS)
    assert done.returncode == 0, done.stderr
    (assert_same_weights if count == 1 else assert_close_weights)(alone, tmp_path)
    assert done.stdout.count("training on 33 images 3x8x8 and 4 held out") == 1
    assert done.stdout.count("step 12/12") == 1
    rows, expected = (read_log(folder / "log.csv") for folder in (tmp_path, alone))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("loss", "loss_quarter_1", "gradient_norm", "validation_loss"):
            assert (row[name] == "") == (wanted[name] == "")
            if row[name]:
                assert float(row[name]) == pytest.approx(float(wanted[name]), rel=1e-4)
        assert (row["communication_ms"] != "") == (count > 1 and row["loss"] != "")
    if count > 1:
        assert sum(float(row["communication_ms"] or 0) for row in rows) > 0


def test_two_nodes(tmp_path, images, alone):
    """A torchrun for each, which meet at an address."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    meet = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    train = ("train", "--data", images, "--out", tmp_path, *TINY, *EPOCHS)
    nodes = [begin(1, *train, options=meet) for _ in range(2)]
    outputs = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("step 12/12" in output for output in outputs) == 1
    assert_close_weights(alone, tmp_path)


def test_resumed_with_another_number_of_processes(tmp_path, images, alone):
    for count, epochs, *resume in ((2, 1), (3, 3, "--resume"), (None, 4, "--resume")):
        done = run(
            count, "train", "--data", images, "--out", tmp_path, *TINY, "--epochs", epochs, *resume
        )
        assert done.returncode == 0, done.stderr
    assert_close_weights(alone, tmp_path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, images):
    """The folder of the long run in two processes."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(2, "train", "--data", images, "--out", folder, *TINY, *LONG)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_schedulers_warning_saves_in_every_process(tmp_path, images, unbroken):
    long = ("train", "--data", images, "--out", tmp_path, *TINY, *LONG, "--checkpoint-every", 40)
    process = begin(2, *long)
    wait_for_step(tmp_path, 20, process)
    for worker in workers_of(process):  # as Slurm does; torchrun then passes its own on
        os.kill(worker, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "saving after this step" in output
    saved = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert saved.steps >= 20  # though none was due before the last epoch
    done = run(2, *long, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_weights(unbroken, tmp_path)


def test_a_killed_process_ends_the_run_which_resumes(tmp_path, images, unbroken):
    long = ("train", "--data", images, "--out", tmp_path, *TINY, *LONG)
    process = begin(2, *long)
    wait_for_step(tmp_path, 20, process)
    start = time.monotonic()
    os.kill(workers_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", output)
    done = run(2, *long, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_weights(unbroken, tmp_path)


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path, images, unbroken):
    process = begin(
        2, "train", "--data", images, "--out", tmp_path, *TINY, *LONG,
        options=("--max-restarts=1",),
    )  # fmt: skip
    wait_for_step(tmp_path, 20, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert_same_weights(unbroken, tmp_path)


def test_a_failing_process_is_named_with_its_error(tmp_path, images):
    diverging = ("--learning-rate", "1e30", "--clip-gradient", "1e30")
    done = run(2, "train", "--data", images, "--out", tmp_path, *TINY, *diverging)
    assert done.returncode != 0
    assert re.search(r"(?s)Root Cause.*FloatingPointError: the loss of step \d is", done.stderr)


BAD_STEP = """
import sys
sys.path.insert(0, {here!r})
import torch
import torch.distributed as dist
from small_runs import tiny_trainer
from diffusion_ext.training import TrainingConfig
dist.init_process_group("gloo")
config = TrainingConfig(epochs=2, batch_size=5, skip_bad_steps=True)
run = tiny_trainer({folder!r}, config, norm="group")
calls, losses_and_gradient = [], run.learner.objective.losses_and_gradient

def bad(*arguments):
    calls.append(1)
    losses, gradient = losses_and_gradient(*arguments)
    worse = torch.nan if dist.get_rank() == 1 and len(calls) == 2 else 1.0
    return losses * worse, gradient * worse

run.learner.objective.losses_and_gradient = bad
run.fit(progress=False)
total = sum(p.detach().double().abs().sum() for p in run.model.parameters()).item()
line = f"skipped {{run.progress.skipped}} of {{run.steps}}, weights {{total}}\\n"
print(line, end="", flush=True)
dist.destroy_process_group()
"""


def test_a_bad_step_of_one_process_is_skipped_by_all(tmp_path):
    done = run_script(2, BAD_STEP, tmp_path)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"skipped 1 of 4, weights (\d+\.\d+)", done.stdout)
    assert len(told) == 2
    assert told[0] == told[1]
