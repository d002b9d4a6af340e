"""What a run can be: networks, predictions, losses, precisions, optimizers, averages, data."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    SCHEDULE,
    TinyNetwork,
    assert_same_run,
    fit_stopping_at,
    tiny_data,
    tiny_trainer,
)
from torch import nn

import diffusion_ext as dx
from diffusion_ext.training import (
    ExponentialMovingAverage,
    ImageData,
    Trainer,
    TrainingConfig,
    load_checkpoint,
)
from diffusion_ext.training.draws import Draws
from diffusion_ext.training.ema import power_of
from diffusion_ext.training.learner import Learner
from diffusion_ext.training.objective import Objective, min_snr_weights
from diffusion_ext.training.optimizers import OPTIMIZERS, build_optimizer, learning_rate

CPU = torch.device("cpu")


def config(**options):
    return TrainingConfig(**{"epochs": 4, "batch_size": 4, "checkpoint_every": 2} | options)


# --- the objective --------------------------------------------------------------------------------


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


# --- the optimizer --------------------------------------------------------------------------------


def test_learning_rates():
    def rates(steps_per_epoch=3, **options):
        c = config(**options)
        return [learning_rate(c, step, steps_per_epoch) for step in range(12)]

    assert rates() == pytest.approx(np.repeat([1e-3, 0.75e-3, 0.5e-3, 0.25e-3], 3))
    assert rates(lr_schedule="constant") == [1e-3] * 12
    cosine = 0.5e-3 * (1 + np.cos(np.pi * np.arange(12) / 12))
    assert rates(lr_schedule="cosine") == pytest.approx(cosine)
    warm = rates(lr_schedule="constant", warmup=4)
    assert warm == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, *[1e-3] * 9])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_trains_and_resumes(tmp_path, monkeypatch, name):
    options = config(optimizer=name.lower(), learning_rate=1e-3)
    whole = tiny_trainer(tmp_path / "whole", options)
    before = {k: v.clone() for k, v in whole.model.state_dict().items()}
    whole.fit(progress=False)
    changed = [n for n, v in whole.model.named_parameters() if not torch.equal(v, before[n])]
    assert len(changed) > 20
    parts = tiny_trainer(tmp_path / "parts", options)
    fit_stopping_at(parts, 8, monkeypatch)
    resumed = tiny_trainer(tmp_path / "parts", options)
    resumed.fit(resume=True, progress=False)
    assert_same_run(whole, resumed)


def test_options_of_an_optimizer():
    optimizer = build_optimizer(
        TinyNetwork(), config(optimizer="AdamW", optimizer_options={"weight_decay": 0.3})
    )
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    with pytest.raises(ValueError, match=r"optimizer: wanted one of \['ASGD', .*got 'Lion'"):
        build_optimizer(TinyNetwork(), config(optimizer="Lion"))
    with pytest.raises(ValueError, match=r"optimizer_options: Adam has .*got 'momentum'"):
        build_optimizer(TinyNetwork(), config(optimizer_options={"momentum": 0.9}))
    with pytest.raises(ValueError, match="optimizer_options: Invalid weight_decay value: -1"):
        build_optimizer(TinyNetwork(), config(optimizer_options={"weight_decay": -1.0}))
    with pytest.raises(ValueError, match="model: wanted parameters to train"):
        build_optimizer(TinyNetwork().requires_grad_(False), config())


def test_parameters_that_are_not_trained_stay(tmp_path):
    model = TinyNetwork()
    model.conv.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    Trainer(model, SCHEDULE, tiny_data(), tmp_path, config()).fit(progress=False)
    assert torch.equal(model.conv.bias, before["conv.bias"])
    assert not torch.equal(model.conv.weight, before["conv.weight"])


def test_accumulated_batches_are_one_large_one(tmp_path):
    """Of the same images and draws: group norm sees no batch."""
    data, steps = tiny_data(12), []
    for size, accumulate in ((12, 1), (4, 3)):
        run = tiny_trainer(
            tmp_path / str(size), config(batch_size=size, accumulate=accumulate), data, norm="group"
        )
        draws = run.draws.batch(0, 0, 12, CPU)
        (whole,) = data.batches([np.arange(12)], CPU)
        parts = data.batches([np.arange(i, i + size) for i in range(0, 12, size)], CPU)
        for i, batch in enumerate(parts):
            run.learner.backward(batch, draws.of(torch.arange(i * size, (i + 1) * size)), 12)
        run.learner.optimizer.step = lambda: None  # the gradients are what is compared
        run.learner.optimizer.zero_grad = lambda: None
        run.learner.update(1, 1e-3, False)
        steps.append({n: p.grad.clone() for n, p in run.model.named_parameters()})
        assert len(whole) == 12
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_steps_of_an_epoch_that_accumulation_does_not_divide(tmp_path):
    """10 images by 4: batches of 4, 4, 2, two in a step: two steps an epoch, the second of 2."""
    of, backward = [], Learner.backward
    run = tiny_trainer(tmp_path, config(accumulate=2))
    run.learner.backward = lambda b, d, n: of.append((len(b), n)) or backward(run.learner, b, d, n)
    run.fit(progress=False)
    assert run.steps == 8
    assert of[:3] == [(4, 8), (4, 8), (2, 2)]


def test_a_long_gradient_is_shortened(tmp_path):
    run = tiny_trainer(tmp_path, config(clip_gradient=0.01, optimizer="SGD", learning_rate=1.0))
    (batch,) = run.data.batches([np.arange(4)], CPU)
    run.learner.backward(batch, run.draws.batch(0, 0, 4, CPU), 4)
    before = [p.detach().clone() for p in run.model.parameters()]
    norm = run.learner.update(1, 1.0, False)
    moved = sum((p - q).square().sum() for p, q in zip(run.model.parameters(), before, strict=True))
    assert norm > 0.1
    assert moved.sqrt().item() == pytest.approx(0.01, rel=1e-3)


# --- precision, compilation, dropout --------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_beside_float32(tmp_path, monkeypatch, precision):
    options = config(epochs=30, batch_size=10, precision=precision, learning_rate=3e-3)
    whole = tiny_trainer(tmp_path / precision, options, norm="group")
    outputs = []
    whole.model.register_forward_hook(lambda m, a, out: outputs.append(out.dtype))
    losses = whole.fit(progress=False)
    assert set(outputs) == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in whole.model.parameters())
    exact = tiny_trainer(
        tmp_path / "exact", dataclasses.replace(options, precision="float32"), norm="group"
    ).fit(progress=False)
    assert losses[-1] == pytest.approx(exact[-1], rel=0.05)
    assert losses[-1] < 0.95 * losses[0]

    parts = tiny_trainer(tmp_path / "parts", options, norm="group")
    fit_stopping_at(parts, 9, monkeypatch)
    resumed = tiny_trainer(tmp_path / "parts", options, norm="group")
    resumed.fit(resume=True, progress=False)
    assert_same_run(whole, resumed)
    assert whole.checkpoint().scaler == resumed.checkpoint().scaler


def test_float16_scales_its_loss_and_skips_what_overflows(tmp_path):
    run = tiny_trainer(tmp_path, config(precision="float16"), norm="group")
    (batch,) = run.data.batches([np.arange(4)], CPU)
    with torch.no_grad():
        run.model.out[3].weight.mul_(1e6)
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.learner.backward(batch, run.draws.batch(0, 0, 4, CPU), 4)
    run.learner.update(1, 1e-3, False)
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters())
    assert run.checkpoint().scaler["scale"] == 2**15


@pytest.mark.compiles
def test_a_compiled_network_trains_the_same_weights(tmp_path):
    plain = tiny_trainer(tmp_path / "plain", config(epochs=2), norm="group")
    compiled = tiny_trainer(tmp_path / "compiled", config(epochs=2, compile=True), norm="group")
    assert compiled.fit(progress=False) == pytest.approx(plain.fit(progress=False), rel=1e-4)
    assert plain.checkpoint().model.keys() == compiled.checkpoint().model.keys()


def test_dropout_resumes_within_an_epoch(tmp_path, monkeypatch):
    def build(name):
        options = config(checkpoint_minutes=1e-9, batch_size=2, context_keep=0.5)
        return Trainer(TinyNetwork(dropout=0.5), SCHEDULE, tiny_data(), tmp_path / name, options)

    whole, parts = build("whole"), build("parts")
    whole.fit(progress=False)
    fit_stopping_at(parts, 8, monkeypatch)  # the third step of the second epoch
    assert load_checkpoint(parts.checkpoint_path).epoch_batches == 2
    resumed = build("parts")
    resumed.fit(resume=True, progress=False)
    assert_same_run(whole, resumed)


# --- networks and contexts ------------------------------------------------------------------------


def test_a_network_of_ones_own_and_its_checkpoint(tmp_path):
    run = Trainer(TinyNetwork(), SCHEDULE, tiny_data(), tmp_path, config())
    run.fit(progress=False)
    checkpoint = load_checkpoint(run.checkpoint_path)
    with pytest.raises(ValueError, match="model: this checkpoint is of your own network"):
        checkpoint.build_model()
    model = checkpoint.build_model(TinyNetwork())
    assert not model.training
    assert torch.equal(model.conv.weight, run.ema_model.conv.weight)


def test_a_network_with_another_output(tmp_path):
    class Wrong(TinyNetwork):
        def forward(self, x, t, context):
            return super().forward(x, t, context)[:, :, 1:]

    with pytest.raises(ValueError, match=r"model: wanted an output of x's shape \[4, 1, 4, 4\]"):
        Trainer(Wrong(), SCHEDULE, tiny_data(), tmp_path, config()).fit(progress=False)


def test_networks_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    common = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8),
        "layers_per_block": 1, "norm_num_groups": 4,
    }  # fmt: skip
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    blocks = {"down": ("DownBlock2D", "AttnDownBlock2D"), "up": ("AttnUpBlock2D", "UpBlock2D")}
    plain = diffusers.UNet2DModel(
        **common, down_block_types=blocks["down"], up_block_types=blocks["up"],
        attention_head_dim=4, num_class_embeds=3,
    )  # fmt: skip
    by_class = dx.adapters.from_diffusers(plain, 20, classes=2)
    conditional = diffusers.UNet2DConditionModel(
        **common, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    by_text = dx.adapters.from_diffusers(conditional, 20)
    texts = torch.randn(6, 5, 8)  # [N, words, features]
    options = config(epochs=2, batch_size=3, samples_every=2)
    for name, model, contexts in (
        ("class", by_class, torch.arange(6) % 2),
        ("text", by_text, texts),
    ):
        before = [p.detach().clone() for p in model.parameters()]
        run = Trainer(model, SCHEDULE, ImageData(images, contexts), tmp_path / name, options)
        assert np.isfinite(run.fit(progress=False)).all()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert sum(moved) > 0.9 * len(moved)
        assert (tmp_path / name / "samples" / "epoch-0002.png").is_file()


def test_the_null_class_of_a_diffusers_network():
    class Recording(nn.Module):
        def forward(self, x, timestep, class_labels):
            self.seen = class_labels
            return type("Output", (), {"sample": x})

    model = dx.adapters.from_diffusers(Recording(), 20, classes=3)
    x, t = torch.zeros(3, 1, 4, 4), torch.ones(3)
    model(x, t, torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]]))
    assert model.model.seen.tolist() == [2, 3, 0]
    model(x, t, None)
    assert model.model.seen.tolist() == [3, 3, 3]


# --- averages, validation, folders ----------------------------------------------------------------


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
    assert pictures == ["epoch-0003.png", "epoch-0006.png"]


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
