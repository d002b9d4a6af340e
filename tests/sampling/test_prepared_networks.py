"""A run of a ContextUnet embeds its times and its context once, where nobody watches."""

from __future__ import annotations

import pytest
import torch
from engine_models import draw, unet
from torch import nn

import diffusion_ext as dx


def count_embeddings(monkeypatch):
    calls, embed = [], dx.nn.context_unet.EmbedFC.forward

    def counted(self, x):
        calls.append(len(x))
        return embed(self, x)

    monkeypatch.setattr(dx.nn.context_unet.EmbedFC, "forward", counted)
    return calls


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_run_embeds_its_times_and_its_context_once(monkeypatch, optimized, guidance_scale):
    model = unet()
    options = {"context": torch.tensor([0, 1]), "guidance_scale": guidance_scale}
    by_step = draw(
        lambda *arguments: model(*arguments),
        context=torch.eye(3)[:2],
        **{name: value for name, value in options.items() if name != "context"},
    )
    model = dx.optimize_for_sampling(model) if optimized else model
    calls = count_embeddings(monkeypatch)
    images = draw(model, **options).images
    rows = 2 * int(guidance_scale)
    assert calls == [5, 5, rows, rows]
    torch.testing.assert_close(images, by_step.images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["hook", "child's hook", "global hook", "forward", "subclass"])
def test_a_model_that_is_watched_is_called(monkeypatch, change):
    model, seen, handles = unet(), [], []

    def watch(module, arguments, *output):
        if isinstance(module, dx.nn.ContextUnet | dx.nn.context_unet.EmbedFC):
            seen.append(module)

    if change == "hook":
        model.register_forward_hook(watch)
    elif change == "child's hook":
        model.timeembed1.register_forward_pre_hook(watch)
    elif change == "global hook":
        handles.append(nn.modules.module.register_module_forward_pre_hook(watch))
    elif change == "forward":
        forward = model.forward
        model.forward = lambda *arguments: (seen.append(model), forward(*arguments))[1]
    else:

        class Watched(dx.nn.ContextUnet):
            def forward(self, *arguments):
                seen.append(self)
                return super().forward(*arguments)

        model.__class__ = Watched
    try:
        draw(model)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) >= 5


def test_shapes_are_checked_before_the_run():
    with pytest.raises(ValueError, match=r"shape: wanted \(B, 3, 8, 8\), .* got \(2, 3, 4, 4\)"):
        draw(unet(), shape=(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"context: wanted .* floats \[2, 3\], got .* \[2, 4\]"):
        draw(unet(), context=torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"context: wanted .* floats \[2, 3\], got dict"):
        draw(unet(), context={"c": torch.randn(2, 3)})


def test_a_shape_without_its_batch_is_not_the_contexts_fault():
    with pytest.raises(ValueError, match=r"shape: wanted \(B, 3, 8, 8\), .* got \(3, 8, 8\)"):
        draw(unet(), shape=(3, 8, 8), context=torch.randn(2, 3))
