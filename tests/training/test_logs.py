"""The log of a run: its numbers, what it waits for, and what is left of it after a stop."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_runs import SCHEDULE, fit_stopping_at, tiny_trainer

from diffusion_ext.training import TrainingConfig, logs, read_log
from diffusion_ext.training.learner import Learner
from diffusion_ext.training.logs import LossMeter, RunLog, means
from diffusion_ext.training.processes import Processes

CONFIG = TrainingConfig(
    epochs=4, batch_size=4, checkpoint_every=1, log_every=2, validation=0.2, samples_every=2
)


def test_the_log_has_what_was_trained(tmp_path, monkeypatch):
    run, backward = tiny_trainer(tmp_path, CONFIG), Learner.backward
    losses, times = [], []

    def recording(self, batch, draws, of):
        trained, plain = backward(self, batch, draws, of)
        losses.append(plain.clone())
        times.append(draws.t)
        return trained, plain

    monkeypatch.setattr(Learner, "backward", recording)
    run.fit(progress=False)
    rows = read_log(tmp_path / "log.csv")
    trained = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in trained] == [2, 4, 6, 8]
    assert [int(row["images"]) for row in trained] == [8, 16, 24, 32]
    assert [float(row["epoch"]) for row in trained] == [1, 2, 3, 4]
    for i, row in enumerate(trained):
        of, t = (torch.cat(values[2 * i : 2 * i + 2]) for values in (losses, times))
        assert float(row["loss"]) == pytest.approx(of.mean().item(), rel=1e-5)
        for quarter in range(4):  # of the 20 timesteps
            inside = (t > 5 * quarter) & (t <= 5 * quarter + 5)
            logged = row[f"loss_quarter_{quarter + 1}"]
            if inside.any():
                assert float(logged) == pytest.approx(of[inside].mean().item(), rel=1e-5)
            else:
                assert logged == ""
        assert float(row["gradient_norm"]) > 0
        assert float(row["images_per_second"]) > 0
    rates = [float(row["learning_rate"]) for row in trained]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    held_out = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    assert held_out == pytest.approx(run.validation_losses, rel=1e-5)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path, monkeypatch):
    whole = tiny_trainer(tmp_path / "whole", CONFIG)
    whole.fit(progress=False)
    parts = tiny_trainer(tmp_path / "parts", CONFIG)
    fit_stopping_at(parts, 6, monkeypatch)
    log = tmp_path / "parts" / "log.csv"
    log.write_text(log.read_text() + "7,3.5,28,1.5,0.9,,,,,,,,\n8,4,32")  # another life, cut short
    tiny_trainer(tmp_path / "parts", CONFIG).fit(resume=True, progress=False)
    timed = ("seconds", "images_per_second")
    expected, found = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_log(folder / "log.csv")]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert found == expected


def test_a_line_is_written_when_the_next_one_is_due(tmp_path):
    """Its numbers are on their way from the device until then."""
    log = RunLog(tmp_path, 0, LossMeter(20, torch.device("cpu")), Processes())
    for step in (1, 2):
        ones = torch.ones(3)
        log.meter.add(step * ones, step * ones, torch.tensor([1, 10, 20]))
        log.line({"step": step, "epoch": 0, "images": 3 * step}, None)
        assert [row["step"] for row in read_log(log.path)] == [str(i) for i in range(1, step)]
    log.close()
    rows = read_log(log.path)
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "1"), ("2", "2")]
    assert np.isnan(means(log.meter.take())["loss"])


def test_a_line_has_all_that_was_trained_since_the_last_one(tmp_path, monkeypatch):
    """Over the end of an epoch: three steps an epoch, a line every two."""
    run, backward, losses = tiny_trainer(tmp_path), Learner.backward, []
    run.config = dataclasses.replace(run.config, log_every=2)

    def recording(self, batch, draws, of):
        trained, plain = backward(self, batch, draws, of)
        losses.append(trained.clone())
        return trained, plain

    monkeypatch.setattr(Learner, "backward", recording)
    run.fit(progress=False)
    rows = read_log(tmp_path / "log.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    for i, row in enumerate(rows):
        of = torch.cat(losses[2 * i : 2 * i + 2])
        assert float(row["loss"]) == pytest.approx(of.mean().item(), rel=1e-5)


def test_tensorboard_has_the_same_numbers_and_the_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny_trainer(tmp_path, CONFIG)
    run.fit(progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "learning_rate", "validation_loss"):
        logged = [
            (int(row["step"]), pytest.approx(float(row[name]), rel=1e-4))
            for row in read_log(tmp_path / "log.csv")
            if row[name]
        ]
        assert [(e.step, e.value) for e in events.Scalars(name)] == logged
    assert [image.step for image in events.Images("samples")] == [4, 8]


def test_without_tensorboard_there_is_the_csv(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    tiny_trainer(tmp_path, CONFIG).fit(progress=False)
    assert not (tmp_path / "tensorboard").exists()
    assert read_log(tmp_path / "log.csv")
    assert logs.read_log(tmp_path / "none.csv") == []


def test_the_configuration_is_there_to_read(tmp_path):
    run = tiny_trainer(tmp_path, CONFIG)
    run.fit(progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["class"] == "ContextUnet"
    assert config["model"]["n_feat"] == 8
    assert config["training"]["log_every"] == 2
    assert (config["images"], config["held_out"]) == (8, 2)
    assert config["timesteps"] == SCHEDULE.timesteps
    assert config["parameters"] == sum(p.numel() for p in run.model.parameters())


def test_the_lines_on_the_terminal(tmp_path, capsys):
    tiny_trainer(tmp_path, CONFIG).fit()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {i}/8" for i in (2, 4, 6, 8)]
    assert all("  held out " in line and line.endswith(" images/s") for line in lines)
    assert [" left  " in line for line in lines] == [True, True, True, False]
