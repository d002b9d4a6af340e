"""What happens to a run that is killed, interrupted, or out of space: nothing is lost."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_runs import CONFIG as KILLED
from many_processes import (
    ENVIRONMENT,
    TINY,
    assert_same_weights,
    begin,
    run,
    wait_for_step,
)
from PIL import Image
from small_runs import assert_same_run, tiny_trainer

from diffusion_ext.training import (
    TrainingConfig,
    load_checkpoint,
    read_log,
)

HERE = Path(__file__).parent


def test_killed_at_twenty_random_moments(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", KILLED)
    whole.fit(progress=False)
    done = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", tmp_path / "parts", "1"],
        env={**ENVIRONMENT, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    reached = list(map(int, done.stdout.split()))
    assert len(reached) == 20
    assert reached == sorted(reached)
    assert len(set(reached)) > 10  # it came further in most of its lives
    again = tiny_trainer(tmp_path / "parts", KILLED)
    again.restore(load_checkpoint(again.checkpoint_path))
    assert_same_run(whole, again)
    assert [row["step"] for row in read_log(tmp_path / "parts" / "log.csv")] == [
        row["step"] for row in read_log(tmp_path / "whole" / "log.csv")
    ]


def ordinary_signals():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_saves_and_ends(tmp_path, images, number, status):
    train = ("train", "--data", images, *TINY, "--epochs", 300, "--checkpoint-every", 300)
    folder = tmp_path / "stopped"
    process = begin(None, *train, "--out", folder, first=ordinary_signals)
    wait_for_step(folder, 20, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert "saving after this step" in output
    saved = load_checkpoint(folder / "checkpoint.safetensors")
    assert saved.steps >= 20
    assert saved.epoch_batches or len(saved.losses) >= 6
    assert not (folder / ".lock").exists()


def test_a_second_signal_ends_at_once(tmp_path):
    """In a step that takes long: the first one waits for it, the second does not."""
    script = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from small_runs import tiny_trainer
run = tiny_trainer({str(tmp_path)!r})
run.learner.update = lambda *_: (print("in the step", flush=True), time.sleep(60))
run.fit(progress=False)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=ordinary_signals,
    )  # fmt: skip
    assert process.stdout.readline() == "in the step\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_workers_that_read_ahead_outlive_a_signal_to_the_group(tmp_path):
    """As a terminal's Ctrl-C is, and torchrun's SIGTERM."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i:02}.png")
    train = ("train", "--data", folder, "--size", 8, "--lazy", "True", "--workers", 2, *TINY)
    out = tmp_path / "run"
    process = begin(
        None, *train, "--out", out, "--epochs", 300, "--checkpoint-every", 300,
        first=lambda: (os.setsid(), ordinary_signals()),
    )  # fmt: skip
    wait_for_step(out, 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 143, output
    assert load_checkpoint(out / "checkpoint.safetensors").steps >= 5


def no_file_beyond(size: int):
    """What a full disk does: a write fails that would go beyond the limit."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, images):
    train = ("train", "--data", images, *TINY)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(None, *train, "--out", whole, "--epochs", 3).returncode == 0
    assert run(None, *train, "--out", parts, "--epochs", 1).returncode == 0
    before = (parts / "checkpoint.safetensors").read_bytes()
    process = begin(
        None, *train, "--out", parts, "--epochs", 3, "--resume", first=no_file_beyond(20_000)
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(
        r"checkpoint: step 6 cannot be written to \S+ \(File too large\)\. The last good "
        r"checkpoint, of step 3, is \S+checkpoint\.safetensors",
        output,
    )
    assert (parts / "checkpoint.safetensors").read_bytes() == before
    assert not list(parts.glob("*.tmp"))
    assert run(None, *train, "--out", parts, "--epochs", 3, "--resume").returncode == 0
    assert_same_weights(whole, parts)


def test_no_space_for_the_log(tmp_path, images):
    """The run goes on to its checkpoint, which cannot be written either."""
    process = begin(
        None, "train", "--data", images, "--out", tmp_path, *TINY, "--epochs", 20,
        "--checkpoint-every", 20, first=no_file_beyond(2000),
    )  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.count("misses lines, which cannot be written") == 1
    assert "checkpoint: step 60 cannot be written" in output
    assert "There is no checkpoint yet." in output
    rows = read_log(tmp_path / "log.csv")
    assert 0 < len(rows) < 60
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)


def two_checkpoints(folder):
    run = tiny_trainer(folder, TrainingConfig(epochs=2, batch_size=4, checkpoint_every=1, keep=2))
    run.fit(progress=False)
    return run.checkpoint_path, folder / "checkpoint-00000003.safetensors"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1000)


def alter(path):
    """A bit of one weight."""
    content = bytearray(path.read_bytes())
    content[-5000] ^= 64
    path.write_bytes(content)


def alter_header(path):
    content = path.read_bytes()
    changed = re.sub(rb'steps\\": 6', rb'steps\\": 7', content, count=1)
    assert changed != content
    path.write_bytes(changed)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, alter, alter_header, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(tmp_path, damage):
    path, before = two_checkpoints(tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(path)
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, keep=2)
    with pytest.raises(ValueError, match=rf"{path}.* the one before it is {before}: resume from"):
        tiny_trainer(tmp_path, config).fit(resume=True, progress=False)
    run = tiny_trainer(tmp_path, config)
    run.fit(resume=before, progress=False)
    assert run.steps == 12
    assert load_checkpoint(path).steps == 12
    assert (tmp_path / "checkpoint.replaced").exists()


def test_a_foreign_checkpoint(tmp_path):
    path, _ = two_checkpoints(tmp_path)
    other = tiny_trainer(tmp_path / "other", TrainingConfig(epochs=1, batch_size=4, seed=3))
    other.fit(progress=False)
    shutil.copy(other.checkpoint_path, path)
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, keep=2)
    with pytest.raises(ValueError, match="seed: the checkpoint to resume has 3, this run 0"):
        tiny_trainer(tmp_path, config).fit(resume=True, progress=False)


def test_resumed_where_an_epoch_was_trained_but_not_ended(tmp_path, monkeypatch, capsys):
    """A signal in the last step of an epoch."""
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, validation=0.2, seed=7)
    whole = tiny_trainer(tmp_path / "whole", config)
    whole.fit(progress=False)
    run = tiny_trainer(tmp_path / "parts", config)
    update = run.learner.update

    def interrupted(step, *rest):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return update(step, *rest)

    run.learner.update = interrupted
    with pytest.raises(SystemExit):
        run.fit(progress=False)
    assert load_checkpoint(run.checkpoint_path).epoch_batches == run.batches_per_epoch
    again = tiny_trainer(tmp_path / "parts", config)
    again.fit(resume=True)
    assert_same_run(whole, again)
    assert "step 4/8  loss" in capsys.readouterr().out


def test_two_runs_into_one_folder(tmp_path, images):
    train = ("train", "--data", images, "--out", tmp_path, *TINY, "--epochs", 300)
    process = begin(None, *train)
    wait_for_step(tmp_path, 3, process)
    second = run(None, *train, "--resume")
    assert second.returncode == 2
    assert f"folder: another run writes into {tmp_path}: process {process.pid} on" in second.stderr
    process.kill()
    process.communicate()
    saved = load_checkpoint(tmp_path / "checkpoint.safetensors")
    again = tiny_trainer(tmp_path / "own")
    again.learner.update = lambda *_: tiny_trainer(tmp_path / "own").fit(progress=False)
    with pytest.raises(BlockingIOError, match="another run of this process writes into"):
        again.fit(progress=False)
    assert saved.steps > 0
    third = begin(None, *train, "--resume")  # a killed run has left no lock
    wait_for_step(tmp_path, saved.steps + 1, third)
    third.kill()
    third.communicate()


def test_a_folder_that_vanishes_is_made_anew(tmp_path):
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, log_every=1, seed=7)
    whole = tiny_trainer(tmp_path / "whole", config)
    whole.fit(progress=False)
    run, folder = tiny_trainer(tmp_path / "run", config), tmp_path / "run"
    update = run.learner.update

    def vanish(step, *rest):
        if step == 8:
            shutil.rmtree(folder)
        return update(step, *rest)

    run.learner.update = vanish
    run.fit(progress=False)
    assert_same_weights(whole.folder.path, folder)
    assert (folder / "config.json").exists()
    assert [int(row["step"]) for row in read_log(folder / "log.csv")][-1] == 12


def as_nobody(function, *arguments):
    """In a process without rights; what went wrong there, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        message = ""
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            function(*arguments)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.parametrize("where", ["read-only", "under a file"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    folder = tmp_path / "run"
    if where == "read-only":
        folder.mkdir(mode=0o555)
    else:
        folder.write_text("")
        folder = folder / "inside"
    said = as_nobody(lambda: tiny_trainer(folder).fit(progress=False))
    assert re.match(rf"(PermissionError|NotADirectoryError): .*{folder}", said)
