"""What a network is trained for: losses, weights, timesteps, mirrored images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    SCHEDULE,
    TinyNetwork,
    tiny_data,
)
from torch import nn

import diffusion_ext as dx
from diffusion_ext.training import (
    ImageData,
    Trainer,
    TrainingConfig,
)
from diffusion_ext.training.draws import Draws
from diffusion_ext.training.learner import Learner
from diffusion_ext.training.objective import Objective, min_snr_weights

CPU = torch.device("cpu")


def config(**options):
    given = {"epochs": 4, "batch_size": 4, "checkpoint_every": 2, "flip": False}
    return TrainingConfig(**given | options)


def exact_loss(options, x0, t, seeds, model, context):
    """The loss of a step in float64, written out: the weighted mean over samples."""
    noise = dx.philox_normal(seeds, x0.shape, dtype=torch.float64)  # of the right shape
    for b in range(len(x0)):
        step = int(t[b])
        noise[b : b + 1] = dx.philox_normal(
            seeds[b : b + 1], (1, *x0.shape[1:]), step=step, stream=2, dtype=torch.float64
        )
    x0, last = x0.double(), SCHEDULE.timesteps
    ab = torch.from_numpy(SCHEDULE.alpha_bar[t.numpy()])
    share = t.double() / last
    path = {"epsilon": (ab.sqrt(), (1 - ab).sqrt()), "flow": (1 - share, share)}
    signal, sigma = (
        v.reshape(-1, 1, 1, 1) for v in path.get(options["prediction"], path["epsilon"])
    )
    target = {
        "epsilon": noise,
        "v": signal * noise - sigma * x0,
        "x0": x0,
        "flow": noise - x0,
    }[options["prediction"]]
    output = model(signal * x0 + sigma * noise, share, context)
    huber = options.get("huber")
    if huber:
        losses = F.huber_loss(output, target, reduction="none", delta=huber).mean((1, 2, 3))
    else:
        losses = (output - target).square().mean((1, 2, 3))
    gamma, weights = options.get("min_snr"), 1.0
    if gamma:  # Hang et al. 2023, section 3.4
        snr = (signal / sigma).square().flatten()
        least = snr.clamp(max=gamma)
        weights = {
            "epsilon": least / snr,
            "v": least / (snr + 1),
            "x0": least,
            "flow": least * sigma.flatten() ** 2,
        }[options["prediction"]]
    return (weights * losses).mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize("more", [{}, {"huber": 0.5}, {"min_snr": 5.0}])
def test_a_step_has_the_loss_and_gradient_that_torch_writes_out(prediction, more):
    options = {"prediction": prediction, **more}
    learner = Learner(TinyNetwork(), config(**options), SCHEDULE, CPU)
    data = tiny_data()
    (batch,) = data.batches([np.arange(5)], CPU)
    draws = Draws(learner.config, SCHEDULE.timesteps).batch(3, 17, 5, CPU)
    trained, _ = learner.backward(batch, draws, 5)

    exact = TinyNetwork().double()
    context = batch.context.double() * draws.keep[:, None]
    loss = exact_loss(options, batch.images, draws.t, draws.seeds, exact, context)
    loss.backward()
    torch.testing.assert_close(trained.mean().double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(learner.model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_min_snr_with_a_terminal_snr_of_zero_is_finite():
    schedule = SCHEDULE.zero_terminal_snr()
    for prediction in ("epsilon", "v", "x0", "flow"):
        weights = min_snr_weights(schedule, config(prediction=prediction, min_snr=5.0))
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
    assert min_snr_weights(schedule, config(min_snr=5.0))[-1] == 1  # of ε, the limit


class Perceptron(nn.Module):
    """A network of x [B,1,4,4], the time and the class, that can tell one flat image from another,
    which a norm by groups would take away."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(19, 128), nn.SiLU(), nn.Linear(128, 16))

    def forward(self, x, t, context):
        return self.layers(torch.cat([x.flatten(1), t[:, None], context], 1)).view_as(x)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_every_prediction_is_learned(tmp_path, prediction):
    """Two flat images, of which the class tells everything: the loss falls, and samples show it."""
    levels = torch.tensor([-0.8, 0.8])
    images = levels.reshape(2, 1, 1, 1).expand(2, 1, 4, 4).repeat(16, 1, 1, 1)
    options = config(
        epochs=600, batch_size=32, learning_rate=1e-2, prediction=prediction, context_keep=1.0,
        checkpoint_every=600,
    )  # fmt: skip
    schedule = dx.NoiseSchedule.linear(50, 1e-3, 0.1)  # at whose end little of an image is left
    data = ImageData(images, torch.eye(2).repeat(16, 1))
    run = Trainer(Perceptron(), schedule, data, tmp_path, options)
    losses = run.fit(progress=False)
    assert np.mean(losses[-10:]) < 0.2 * losses[0]
    x = dx.sample(run.ema_model, (2, 1, 4, 4), run.preview.table, torch.eye(2), progress=False)
    assert (x.images.mean((1, 2, 3)) - levels).abs().max() < 0.25
    assert x.images.std((1, 2, 3)).max() < 0.25


def test_timesteps_by_logit_normal_and_by_the_user(tmp_path):
    drawn = Draws(config(timestep_sampling="logit-normal"), 1000).batch(0, 0, 20000, CPU).t
    exact = torch.distributions.Normal(0.0, 1.0)
    assert drawn.min() >= 1
    assert drawn.max() <= 1000
    for share in (0.1, 0.3, 0.5, 0.9):  # P(sigmoid(z) <= share)
        below = (drawn <= 1000 * share).double().mean()
        expected = exact.cdf(torch.logit(torch.tensor(share)))
        assert abs(below - expected) < 0.015

    mine = Trainer(
        TinyNetwork(), SCHEDULE, tiny_data(), tmp_path, config(),
        draw_timesteps=lambda random, n: random.choice([3, 5], n),
    )  # fmt: skip
    assert set(mine.draws.batch(0, 0, 100, CPU).t.tolist()) == {3, 5}
    bad = Draws(config(), 20, lambda random, n: np.full(n, 21))
    with pytest.raises(ValueError, match="draw_timesteps: wanted 4 integers from 1 to 20, got"):
        bad.batch(0, 0, 4, CPU)


def test_half_of_the_images_are_mirrored(tmp_path, monkeypatch):
    seen, noised = [], Objective.noised
    monkeypatch.setattr(
        Objective, "noised", lambda self, x, t, s: seen.append(x.clone()) or noised(self, x, t, s)
    )
    ramp = torch.linspace(-1, 1, 4).expand(1, 4, 4).repeat(40, 1, 1, 1)
    model = TinyNetwork()
    Trainer(model, SCHEDULE, ImageData(ramp), tmp_path, config(epochs=2, flip=True)).fit(
        progress=False
    )
    rising = torch.cat(seen)[:, 0, 0, 3] > 0
    assert 20 < rising.sum() < 60
    flipped = torch.cat(seen)[~rising]
    assert torch.equal(flipped, ramp[:1].flip(3).expand_as(flipped))
