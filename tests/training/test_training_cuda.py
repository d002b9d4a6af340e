"""Training on a GPU: what it waits for, and runs that change their device."""

import pytest
import torch
from harness import waits_are_errors

import diffusion_ext as dx
from diffusion_ext.training import ImageData, Trainer, TrainingConfig
from diffusion_ext.training.steps import Steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")


def trainer(folder, device="cuda", **options):
    torch.manual_seed(0)
    data = ImageData(torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 3)
    options = {"epochs": 2, "batch_size": 3, "checkpoint_every": 1} | options
    options["lr_schedule"] = "constant"
    model = dx.nn.ContextUnet(1, 8, 3, 8, norm="group")
    config = TrainingConfig(**options)
    return Trainer(model, dx.NoiseSchedule.linear(50), data, folder, config, device)


def waiting_is_an_error(monkeypatch, run):
    """In a run's steps after the first. Returns: the losses, and how many steps there were."""
    step, steps = Steps.step, []

    def watched(self, meter):
        steps.append(self)
        with waits_are_errors(len(steps) > 1):
            return step(self, meter)

    monkeypatch.setattr(Steps, "step", watched)
    return run.fit(progress=False), len(steps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bfloat16", "clip_gradient": 1.0, "log_every": 1},
        {"accumulate": 2, "flip": True, "min_snr": 5.0, "huber": 0.1, "ema_std": 0.05},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, options):
    losses, steps = waiting_is_an_error(monkeypatch, trainer(tmp_path, **options))
    assert torch.tensor(losses).isfinite().all()
    assert steps == (4 if "accumulate" in options else 8)


def test_skipping_bad_steps_waits_once_a_step(tmp_path, monkeypatch):
    read, to_float = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: (read.append(t), to_float(t))[1])
    trainer(tmp_path, epochs=1, skip_bad_steps=True).fit(progress=False)
    assert len(read) == 4 + 1  # steps, and the loss of the epoch


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_losses_are_those_of_the_cpu(tmp_path, precision):
    losses = [
        trainer(tmp_path / device, device, precision=precision).fit(progress=False)
        for device in ("cuda", "cpu")
    ]
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-2)


def test_a_run_that_changes_its_device(tmp_path):
    whole = trainer(tmp_path / "whole", "cpu", epochs=3).fit(progress=False)
    for epochs, device in enumerate(("cuda", "cpu", "cuda"), 1):
        run = trainer(tmp_path / "run", device, epochs=epochs)
        losses = run.fit(resume=epochs > 1, progress=False)
    torch.testing.assert_close(losses, whole, rtol=1e-3, atol=1e-3)
    assert next(run.ema_model.parameters()).is_cuda
