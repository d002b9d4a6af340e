"""The training loop: exact resumption, the averages, the draws, and every error message."""

import dataclasses

import numpy as np
import pytest
import torch
from small_runs import SCHEDULE, assert_same_run, fit_stopping_at, tiny_data, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_ext as dx
from diffusion_ext.training import (
    ExponentialMovingAverage,
    ImageData,
    Trainer,
    TrainingConfig,
    load_checkpoint,
    run_folder,
)
from diffusion_ext.training.learner import Learner
from diffusion_ext.training.objective import Objective


@pytest.mark.parametrize(
    "model_options",
    [{"norm": "batch"}, {"norm": "group"}, {"shortcut": "random"}],
    ids=lambda options: "-".join(options.values()),
)
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, model_options):
    whole = tiny_trainer(tmp_path / "whole", **model_options)
    whole.fit(progress=False)

    stopped = tiny_trainer(tmp_path / "parts", **model_options)
    fit_stopping_at(stopped, 8, monkeypatch)  # in the third epoch, after the second's checkpoint
    torch.rand(3)  # the state of torch's own generator must not matter
    resumed = tiny_trainer(tmp_path / "parts", **model_options)
    resumed.fit(resume=True, progress=False)
    assert_same_run(whole, resumed)
    assert whole.epoch == 4


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = tiny_trainer(tmp_path)
    losses = list(run.fit(progress=False))
    again = tiny_trainer(tmp_path)
    assert again.fit(resume=True, progress=False) == losses
    assert_same_run(run, again)


def test_training_leaves_the_global_generator_alone(tmp_path):
    run = tiny_trainer(tmp_path, shortcut="random")
    before = torch.get_rng_state()
    run.fit(progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns_two_flat_images(tmp_path):
    """Given x_t and the class, the noise in a one-image class is certain: the loss nears 0."""
    data = ImageData(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4), torch.eye(2))
    torch.manual_seed(0)
    model = dx.nn.ContextUnet(1, 8, 2, 4, norm="group")
    config = TrainingConfig(epochs=300, learning_rate=1e-2, context_keep=1.0, checkpoint_every=300)
    data = ImageData(data.images.repeat(8, 1, 1, 1), data.contexts.repeat(8, 1))
    losses = Trainer(model, SCHEDULE, data, tmp_path, config).fit(progress=False)
    assert losses[0] > 0.8
    assert np.mean(losses[-20:]) < 0.25


def test_every_draw(tmp_path, monkeypatch):
    """Seeds are used once, times lie in 1..T, each image comes once an epoch, contexts drop."""
    seen = {"seeds": [], "t": [], "images": [], "kept": [], "time": []}
    noised = Objective.noised

    def recording(self, x0, t, seeds):
        seen["seeds"] += seeds.tolist()
        seen["t"] += t.tolist()
        seen["images"] += x0[:, 0, 0, 0].tolist()
        return noised(self, x0, t, seeds)

    def look(_, arguments):
        _, time, context = arguments
        seen["time"] += time.tolist()
        seen["kept"] += context.any(1).tolist()

    monkeypatch.setattr(Objective, "noised", recording)
    config = TrainingConfig(epochs=60, batch_size=4, context_keep=0.7, seed=7)
    run = tiny_trainer(tmp_path, config)
    run.model.register_forward_pre_hook(look)
    run.fit(progress=False)

    assert sorted(seen["seeds"]) == [(7 << 32) + i for i in range(600)]
    assert set(seen["t"]) == set(range(1, 21))
    np.testing.assert_allclose(seen["time"], np.array(seen["t"]) / 20, rtol=1e-6)
    epochs = np.array(seen["images"]).reshape(60, 10)
    assert (np.sort(epochs, 1) == np.sort(tiny_data().images[:, 0, 0, 0].numpy())).all()
    assert not (epochs[0] == epochs[1]).all()
    assert abs(np.mean(seen["kept"]) - 0.7) < 0.06  # 3 standard deviations


def test_the_loss_is_the_mean_over_samples(tmp_path, monkeypatch):
    run, losses = tiny_trainer(tmp_path), []
    backward = Learner.backward

    def recording(self, batch, draws, of):
        assert of == len(batch)
        trained, plain = backward(self, batch, draws, of)
        assert torch.equal(trained, plain)  # nothing is weighted by default
        losses.append(trained.sum().item())
        return trained, plain

    monkeypatch.setattr(Learner, "backward", recording)
    means = run.fit(progress=False)
    assert means == pytest.approx(np.sum(np.reshape(losses, (4, 3)), axis=1) / 10)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads of tensors, each of which waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_loss_is_read_once_an_epoch_where_no_bar_shows_it(tmp_path):
    run = tiny_trainer(
        tmp_path, TrainingConfig(epochs=4, batch_size=1, checkpoint_every=4, samples_every=0)
    )
    with Reads() as reads:
        run.fit(progress=False)
    assert reads.count == 4


def test_ema_follows_its_definition():
    torch.manual_seed(0)
    model = dx.nn.ContextUnet(1, 8, 2, 4)
    average = ExponentialMovingAverage(model, decay=0.5)
    expected = {n: v.double().clone() for n, v in model.state_dict().items()}
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 4 / 13), (50, 0.5)):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1 if tensor.dtype == torch.int64 else torch.randn_like(tensor))
        average.update(model, step)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    averaged = average.model.state_dict()
    for name, value in averaged.items():
        if value.is_floating_point():  # BatchNorm's running statistics among them
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)
    assert averaged["init_conv.conv1.1.num_batches_tracked"] == 4
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_the_average_is_what_a_checkpoint_samples_with(tmp_path):
    run = tiny_trainer(tmp_path)
    run.fit(progress=False)
    model = load_checkpoint(run.checkpoint_path).build_model()
    drawn = [
        dx.sample(m, (2, 1, 4, 4), dx.ddim(SCHEDULE, 5), torch.tensor([0, 1]), progress=False)
        for m in (model, run.ema_model, run.model)
    ]
    torch.testing.assert_close(drawn[0].images, drawn[1].images, rtol=1e-4, atol=1e-5)
    assert (drawn[0].images - drawn[2].images).abs().max() > 1e-3


def test_checkpoints_come_every_k_epochs_and_at_the_end(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda c, _: written.append(len(c.losses)))
    config = TrainingConfig(epochs=5, batch_size=10, checkpoint_every=2)
    tiny_trainer(tmp_path, config).fit()
    assert written == [2, 4, 5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert all("loss 1." in line or "loss 0." in line for line in lines)
    assert all(line.endswith("images/s") for line in lines)


def test_images_without_context(tmp_path):
    data = ImageData(tiny_data().images)
    model = dx.nn.ContextUnet(1, 8, 1, 4)
    run = Trainer(model, SCHEDULE, data, tmp_path, TrainingConfig(epochs=1))
    assert np.isfinite(run.fit(progress=False)).all()
    assert load_checkpoint(run.checkpoint_path).class_names == ()


def test_a_finished_folder_is_not_overwritten(tmp_path):
    tiny_trainer(tmp_path).fit(progress=False)
    with pytest.raises(FileExistsError, match="is there already: resume it, or choose another"):
        tiny_trainer(tmp_path).fit(progress=False)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: no checkpoint\.safetensors in"):
        tiny_trainer(tmp_path).fit(resume=True, progress=False)


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    run, backward = tiny_trainer(tmp_path), Learner.backward

    def diverging(self, batch, draws, of):
        trained, plain = backward(self, batch, draws, of)
        return (trained * torch.nan if run.epoch == 2 else trained), plain

    monkeypatch.setattr(Learner, "backward", diverging)
    with pytest.raises(FloatingPointError, match="the loss of step 7 is nan, at learning rate"):
        run.fit(progress=False)
    assert load_checkpoint(run.checkpoint_path).losses == run.losses
    assert len(run.losses) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "batch_size: the checkpoint to resume has 4, this run 5"),
        ({"learning_rate": 0.1}, r"learning_rate: the checkpoint to resume has 0\.001, this"),
        ({"seed": 8}, "seed: the checkpoint to resume has 7, this run 8"),
    ],
)
def test_resuming_another_run(tmp_path, change, message):
    run = tiny_trainer(tmp_path)
    run.fit(progress=False)
    other = tiny_trainer(tmp_path, dataclasses.replace(run.config, **change))
    with pytest.raises(ValueError, match=message):
        other.fit(resume=True, progress=False)


def test_resuming_another_model_or_schedule(tmp_path):
    run = tiny_trainer(tmp_path)
    run.fit(progress=False)
    with pytest.raises(ValueError, match="norm: the checkpoint to resume has batch, this run gr"):
        tiny_trainer(tmp_path, norm="group").fit(resume=True, progress=False)
    other = tiny_trainer(tmp_path)
    other.schedule = dx.NoiseSchedule.cosine(20)
    with pytest.raises(ValueError, match="schedule: the checkpoint to resume has another one"):
        other.fit(resume=True, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: wanted at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: wanted at least 1, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every: wanted at least 1, got 0"),
        ({"learning_rate": 0.0}, r"learning_rate: wanted more than 0, got 0\.0"),
        ({"context_keep": 1.5}, r"context_keep: wanted a probability, got 1\.5"),
        ({"seed": -1}, "seed: wanted 0 to 2147483647, got -1"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_bad_ema_decay(tmp_path):
    with pytest.raises(ValueError, match="ema_decay: wanted 0 <= ema_decay < 1, got 1"):
        tiny_trainer(tmp_path, TrainingConfig(ema_decay=1.0))


def test_data_must_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"data: wanted images \['N', 3, 4, 4\] .*\[10, 1, 4, 4\]"):
        Trainer(dx.nn.ContextUnet(3, 8, 2, 4), SCHEDULE, tiny_data(), tmp_path)
    with pytest.raises(ValueError, match=r"data: wanted contexts \['N', 5\] .* got \[10, 2\]"):
        Trainer(dx.nn.ContextUnet(1, 8, 5, 4), SCHEDULE, tiny_data(), tmp_path)
