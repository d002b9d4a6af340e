"""Losses, gradients and weights that are not finite: named, or skipped and counted, never saved."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import tiny_trainer

from diffusion_ext.training import TrainingConfig, load_checkpoint, load_data, read_log
from diffusion_ext.training.learner import Learner


def test_an_infinite_loss_names_the_step_the_files_and_the_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        Image.new("L", (4, 4), 25 * i).save(folder / f"{i}.png")
    for lazy in (False, True):
        out = tmp_path / f"run-{lazy}"
        data = load_data(folder, size=4, lazy=lazy)
        config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1)
        run, backward = tiny_trainer(out, config, data), Learner.backward

        def bad(self, batch, draws, of, run=run, backward=backward):
            trained, plain = backward(self, batch, draws, of)
            white = batch.images.amax((1, 2, 3)) > 0.7  # one file
            return torch.where(white & (run.epoch == 1), torch.inf, trained), plain

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "backward", bad)
            with pytest.raises(FloatingPointError) as raised:
                run.fit(progress=False)
        message = str(raised.value)
        assert re.match(
            r"the loss of step [456] is inf, at learning rate 0\.00075, for 1 of [24] images:\n  "
            rf"{folder}/9\.png, timestep \d+\nThe last good checkpoint, of step 3, is "
            rf"{out}/checkpoint\.safetensors\. Try a lower",
            message,
        )
        assert load_checkpoint(run.checkpoint_path).steps == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The gradient overflowed in a step whose loss was finite, and a checkpoint is due."""
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, seed=7)
    run = tiny_trainer(tmp_path, config)
    update = run.learner.update

    def overflowing(step, *rest):
        norm = update(step, *rest)
        if step == 6:
            next(run.model.parameters()).data.view(-1)[3] = torch.inf
        return norm

    run.learner.update = overflowing
    message = (
        "weights after step 6 are not finite, though its loss was. The last good checkpoint, of"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        run.fit(progress=False)
    assert load_checkpoint(run.checkpoint_path).steps == 3


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_bad_steps_are_skipped_and_counted(tmp_path, monkeypatch, norm):
    """The weights, running statistics, average and losses miss them."""
    config = TrainingConfig(epochs=4, batch_size=4, checkpoint_every=1, log_every=1, seed=7,
                            skip_bad_steps=True)  # fmt: skip
    run = tiny_trainer(tmp_path, config, norm=norm)
    backward, seen = Learner.backward, []

    def bad(self, batch, draws, of):
        seen.append({n: p.clone() for n, p in self.model.state_dict().items()})
        trained, plain = backward(self, batch, draws, of)
        if len(seen) in (2, 5):
            next(self.model.parameters()).grad.fill_(torch.nan)
            return trained * torch.nan, plain * torch.nan
        return trained, plain

    monkeypatch.setattr(Learner, "backward", bad)
    run.fit(progress=False)
    assert run.progress.skipped == 2
    assert load_checkpoint(run.checkpoint_path).skipped_steps == 2
    for step in (2, 5):  # what a bad step started from is what the next one starts from
        same = [torch.equal(seen[step - 1][name], seen[step][name]) for name in seen[0]]
        assert all(same)
    assert not torch.equal(seen[2]["init_conv.conv1.0.weight"], seen[3]["init_conv.conv1.0.weight"])
    assert np.isfinite(run.losses).all()
    assert all(p.isfinite().all() for p in run.ema_model.parameters())
    rows = read_log(tmp_path / "log.csv")
    assert [row["skipped_steps"] for row in rows] == list("011122222222")
    assert [i for i, row in enumerate(rows) if row["loss"] == "nan"] == [1, 4]


def test_a_run_whose_every_step_is_bad_says_so(tmp_path):
    config = TrainingConfig(epochs=2, learning_rate=1e30, skip_bad_steps=True, batch_size=1)
    with pytest.raises(FloatingPointError, match=r"epoch 2 trained no image: 1\d steps were skip"):
        tiny_trainer(tmp_path, config).fit(progress=False)
