"""The engine "compile": the network under torch.compile, once for all runs of a kind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from engine_models import SHAPE, TABLES, Network, draw, unet

import diffusion_ext as dx


@pytest.mark.compiles
def test_compile_once():
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]
    compiled.clear()
    model, labels = Network(), torch.tensor([2, 0])
    options = {"context": labels, "guidance_scale": 2.0, "table": TABLES["noise"]}
    for seeds in (1, 2):
        ours = draw(model, engine="compile", seeds=seeds, save_rate=50, **options)
        eager = draw(model, seeds=seeds, save_rate=50, **options)
        torch.testing.assert_close(ours.images, eager.images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.frames, eager.frames, rtol=1e-4, atol=1e-5)
        assert compiled["unique_graphs"] == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.compiles
@pytest.mark.parametrize("optimized", [False, True])
def test_compile_a_prepared_network(monkeypatch, optimized):
    """By a backend that compiles nothing: it is torch's own that takes its time."""
    torch._dynamo.reset()
    traced, compile_ = [], torch.compile

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_(f, backend=backend, **o))
    model = unet()
    model = dx.optimize_for_sampling(model) if optimized else model
    for _ in range(2):
        ours = draw(model, engine="compile", context=torch.tensor([0, 1])).images
        assert len(traced) == 1
    expected = draw(model, context=torch.tensor([0, 1])).images
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_compile_is_differentiable(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    x_T = torch.randn(SHAPE, requires_grad=True)
    draw(Network(), x_T=x_T, engine="compile", differentiable=True).images.sum().backward()
    assert x_T.grad.abs().max() > 0
