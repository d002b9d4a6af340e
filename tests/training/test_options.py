"""What else a run can be: averages, images held out, its folder, bad options."""

import numpy as np
import pytest
import torch
from small_runs import (
    tiny_data,
    tiny_trainer,
)
from torch import nn

from diffusion_ext.training import (
    ExponentialMovingAverage,
    TrainingConfig,
    load_checkpoint,
)
from diffusion_ext.training.ema import power_of
from diffusion_ext.training.objective import Objective

CPU = torch.device("cpu")


def config(**options):
    return TrainingConfig(**{"epochs": 4, "batch_size": 4, "checkpoint_every": 2} | options)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_power_function_average_has_its_width(std):
    """Its weights t^γ, as the recursion leaves them, have that standard deviation (of 1)."""
    steps = 4000
    average = ExponentialMovingAverage(nn.Linear(1, 1), std=std)
    decays = np.array([average.decay_at(n) for n in range(1, steps + 1)])
    weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    time = np.arange(1, steps + 1) / steps
    mean = (weights * time).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(std, rel=0.01)


def test_bad_widths_of_an_average():
    for std in (0.0, 0.3, -1.0):
        with pytest.raises(ValueError, match=r"ema_std: wanted 0 < ema_std < 0\.288"):
            power_of(std)


def test_images_held_out_are_not_trained_and_always_noised_alike(tmp_path, monkeypatch):
    seen, noised = [], Objective.noised

    def recording(self, x0, t, seeds):
        seen.append((torch.is_grad_enabled(), x0.clone(), t.clone(), seeds.clone()))
        return noised(self, x0, t, seeds)

    monkeypatch.setattr(Objective, "noised", recording)
    data = tiny_data(20)
    run = tiny_trainer(tmp_path, config(validation=0.25, epochs=3, keep=2), data)
    assert len(run.images) == 15
    run.fit(progress=False)
    trained = {tuple(x.flatten().tolist()) for grad, xs, *_ in seen if grad for x in xs}
    held = [(x, t, s) for grad, x, t, s in seen if not grad]
    of_held = {tuple(x.flatten().tolist()) for xs, *_ in held for x in xs}
    assert (len(trained), len(of_held)) == (15, 5)
    assert not trained & of_held
    third = len(held) // 3
    for first, again in zip(held[:third], held[third : 2 * third], strict=True):
        assert all(map(torch.equal, first, again))
    counts = torch.cat([t for _, t, _ in held[:third]]).bincount(minlength=21)[1:]
    assert counts.min() >= 0.8 * counts.max()  # spread evenly through the timesteps
    assert len(run.validation_losses) == 3


def test_the_folder_of_a_run(tmp_path, monkeypatch):
    run = tiny_trainer(
        tmp_path, config(epochs=6, checkpoint_every=1, keep=3, validation=0.2, samples_every=3)
    )
    losses = iter([0.5, 0.3, 0.4, 0.2, 0.6, 0.7])
    monkeypatch.setattr(run.validation, "loss", lambda *_: next(losses))
    run.fit(progress=False)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "best.safetensors", "checkpoint-00000008.safetensors", "checkpoint-00000010.safetensors",
        "checkpoint.safetensors", "config.json", "log.csv", "samples", "tensorboard",
    ]  # fmt: skip
    assert load_checkpoint(tmp_path / "best.safetensors").steps == 8
    assert load_checkpoint(tmp_path / "checkpoint-00000010.safetensors").steps == 10
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").steps == 12
    pictures = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert pictures == ["step-000006.png", "step-000012.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 0}, "accumulate: wanted at least 1, got 0"),
        ({"prediction": "noise"}, "prediction: wanted one of"),
        ({"huber": 0.0}, r"huber: wanted more than 0, got 0\.0"),
        ({"min_snr": -1.0}, r"min_snr: wanted more than 0, got -1\.0"),
        ({"precision": "int8"}, "precision: wanted one of"),
        ({"lr_schedule": "step"}, "lr_schedule: wanted one of"),
        ({"timestep_sampling": "odd"}, "timestep_sampling: wanted one of"),
        ({"validation": 1.0}, r"validation: wanted a share below 1, got 1\.0"),
        ({"prediction": "flow", "noising": "course"}, "noising: a flow has its own, got 'course'"),
        ({"noising": "flow"}, "noising: wanted one of"),
        ({"warmup": -1}, "warmup: wanted at least 0, got -1"),
        ({"clip_gradient": 0.0}, "clip_gradient: wanted more than 0"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)
