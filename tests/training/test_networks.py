"""Networks that a run trains: precision, compilation, dropout; and whose they are."""

import dataclasses

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
from torch import nn

import diffusion_ext as dx
from diffusion_ext.training import (
    ImageData,
    Trainer,
    TrainingConfig,
    load_checkpoint,
)

CPU = torch.device("cpu")


def config(**options):
    return TrainingConfig(**{"epochs": 4, "batch_size": 4, "checkpoint_every": 2} | options)


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
        assert (tmp_path / name / "samples" / "step-000004.png").is_file()


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
