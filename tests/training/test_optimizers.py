"""The optimizer of a run, its learning rates, accumulated and shortened gradients."""

import numpy as np
import pytest
import torch
from small_runs import (
    SCHEDULE,
    TinyNetwork,
    assert_same_run,
    fit_stopping_at,
    tiny_data,
    tiny_trainer,
)

from diffusion_ext.training import (
    Trainer,
    TrainingConfig,
)
from diffusion_ext.training.learner import Learner
from diffusion_ext.training.optimizers import OPTIMIZERS, build_optimizer, learning_rate
from diffusion_ext.training.plan import planned

CPU = torch.device("cpu")


def config(**options):
    return TrainingConfig(**{"epochs": 4, "batch_size": 4, "checkpoint_every": 2} | options)


def test_learning_rates():
    def rates(steps_per_epoch=3, **options):
        c = planned(config(**options), tiny_data(), 10)
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
    norm, _ = run.learner.update(1, 1.0, False)
    moved = sum((p - q).square().sum() for p, q in zip(run.model.parameters(), before, strict=True))
    assert norm > 0.1
    assert moved.sqrt().item() == pytest.approx(0.01, rel=1e-3)
