"""Variants of the CUDA kernels, on the emulated GPU."""

import pathlib
import sys

import pytest
import torch
from harness import same_bits

import diffusion_ext as dx
from diffusion_ext.ops import backend

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.gpu import variants

SCHEDULE = dx.NoiseSchedule.linear(100)
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def built(monkeypatch):
    """built(variant) compiles one and makes a backend of it; its name."""

    def build(variant: variants.Variant) -> str:
        assert variants.build(True, (variant,)) == 0
        torch.ops.load_library(str(variants.folder_of(True) / f"{variant.library}.so"))
        monkeypatch.setitem(backend.NAMESPACES, variant.library, variant.namespace)
        return variant.library

    return build


def both(name, call, *args, **options):
    """What a variant makes of the values, and what the CPU does, both on the CPU."""
    wanted = call(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args), **options)
    with dx.use_backend(name):
        found = call(*args, **options)
    return found.cpu(), wanted


def gradient(x0, t):
    """Of a loss."""
    output = (0.5 * x0).detach().requires_grad_()
    losses = dx.denoising_loss(output, x0, t, SCHEDULE, seeds=5)
    return torch.autograd.grad(losses.sum(), output)[0]


def test_a_variant_has_the_bits_of_the_cpu(built):
    """Two vectors a thread."""
    (variant,) = (v for v in variants.VARIANTS if v.name == "vectors_2")
    name, t = built(variant), torch.tensor([3, 90, 7], device="cuda")
    for shape in ((3, 5, 7, 3), (3, 4, 40, 40)):
        for layout in FORMATS:
            x0 = torch.randn(shape).bfloat16().to("cuda", memory_format=layout)
            for call in (gradient, lambda x, t: torch.stack(dx.perturb(x, t, SCHEDULE, seeds=5))):
                assert same_bits(*both(name, call, x0, t))


def test_more_threads_for_pixels_than_for_runs(built, monkeypatch):
    """What tuning may choose: a block's sums have room for either walk."""
    monkeypatch.setitem(variants.SOURCES, "denoising_loss", ("denoising_loss",))
    threads = (("kElementThreads", "128"), ("kPixelThreads", "256"))
    name = built(variants.Variant("denoising_loss", "uneven", threads))
    t = torch.tensor([3, 90], device="cuda")
    for layout in FORMATS:
        output = torch.randn(2, 4, 48, 48).bfloat16().to("cuda", memory_format=layout)
        losses = both(name, dx.denoising_loss, output, output, t, schedule=SCHEDULE, seeds=5)
        torch.testing.assert_close(*losses)
