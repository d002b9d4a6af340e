"""Class labels where a ContextUnet takes a context: the one-hot vectors that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import diffusion_ext as dx

LABELS = torch.tensor([4, 0, 2])
X, T = torch.randn(3, 3, 8, 8), torch.rand(3)


def unet(dtype=torch.float32, **options):
    return dx.nn.ContextUnet(3, 8, 5, 8, **options).eval().to(dtype)


def vectors(dtype=torch.float32):
    return F.one_hot(LABELS, 5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_labels_are_one_hot_vectors(dtype):
    model, x, t = unet(dtype), X.to(dtype), T.to(dtype)
    assert torch.equal(model(x, t, LABELS), model(x, t, vectors(dtype)))
    assert not torch.equal(model(x, t, LABELS), model(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_an_optimized_copy(dtype):
    copy = dx.optimize_for_sampling(unet(), 3, dtype, torch.channels_last)
    assert torch.equal(copy(X, T, LABELS), copy(X, T, vectors()))
    with pytest.raises(ValueError, match="c: wanted values from 0 to 4, got 1 to 5"):
        copy(X, T, LABELS + 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_sample_by_labels(optimized, scale):
    model = unet()
    model = dx.optimize_for_sampling(model, 3) if optimized else model
    table = dx.ddim(dx.NoiseSchedule.linear(50), 3)
    ours, theirs = (
        dx.sample(model, X.shape, table, context=c, guidance_scale=scale, progress=False).images
        for c in (LABELS, vectors())
    )
    assert torch.equal(ours, theirs)


def test_gradients_and_training_mode():
    model = unet().train()
    model(X, T, LABELS).sum().backward()
    assert model.contextembed1.model[0].weight.grad.abs().sum() > 0


def test_none_and_one():
    assert unet()(X[:0], T[:0], LABELS[:0]).shape == (0, 3, 8, 8)
    assert unet()(X[:1], T[:1], LABELS[:1]).shape == (1, 3, 8, 8)


@pytest.mark.filterwarnings("ignore")  # torch's, of sizes that a trace fixes
def test_written_down():
    model = unet()
    program = torch.jit.trace(model, (X, T, LABELS))
    other = torch.tensor([1, 1, 3])
    torch.testing.assert_close(program(X, T, other), model(X, T, other))


@pytest.mark.compiles
def test_compiled():
    model = unet()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for labels in (LABELS, LABELS.flip(0)):
        torch.testing.assert_close(compiled(X, T, labels), model(X, T, labels))
    with pytest.raises((IndexError, RuntimeError)):  # never a wrong result
        compiled(X, T, LABELS + 1)
