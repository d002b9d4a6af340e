"""Small runs for the tests of training."""

import torch
from torch import nn

import diffusion_ext as dx
from diffusion_ext.training import ImageData, Trainer, TrainingConfig

SCHEDULE = dx.NoiseSchedule.linear(timesteps=20)


def tiny_data(count=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 4, 4, generator=generator) * 2 - 1
    return ImageData(images, torch.arange(count) % 2)


def tiny_trainer(folder, config=None, data=None, **model_options):
    torch.manual_seed(0)
    model = dx.nn.ContextUnet(1, 8, 2, 4, **model_options)
    config = config or TrainingConfig(epochs=4, batch_size=4, checkpoint_every=2, seed=7)
    return Trainer(model, SCHEDULE, data or tiny_data(), folder, config)


class TinyNetwork(nn.Module):
    """A network of one's own: x, the time and the context, by one convolution."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 1, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t, context):
        b, _, h, w = x.shape
        if context is None:
            context = x.new_zeros(b, 2)
        known = torch.cat([t[:, None], context], 1)[:, :, None, None].expand(b, 3, h, w)
        return self.dropout(self.conv(torch.cat([x, known.to(x.dtype)], 1)))


def state_of(run):
    checkpoint = run.checkpoint()
    return {
        f"{part}.{name}": tensor
        for part in ("model", "ema", "optimizer")
        for name, tensor in getattr(checkpoint, part).items()
    }


def assert_same_run(first, second):
    assert first.losses == second.losses
    assert first.validation_losses == second.validation_losses
    assert (first.steps, first.samples_seen) == (second.steps, second.samples_seen)
    expected, found = state_of(first), state_of(second)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


class Stopped(Exception):
    """A run that was stopped."""


def fit_stopping_at(run, step, monkeypatch, **options):
    """Fits a run that is stopped in its step-th step from here."""
    update, calls = type(run.learner).update, []

    def interrupt(self, *arguments):
        calls.append(1)
        if len(calls) == step:
            raise Stopped
        return update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(run.learner), "update", interrupt)
        try:
            run.fit(progress=False, **options)
        except Stopped:
            return
    raise AssertionError("the run ended first")
