"""What `make bench` times: which works, on which tensors, and which of them under torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import diffusers_networks, transformers
from .device import warm_heap
from .networks import Networks, forwards, samplings, trainings
from .norms import GROUPS, MORE_SHAPES, NORM_SHAPES, norms
from .objective import objectives
from .pipelines import pipelines
from .steps import normals, perturbs, sampler_steps
from .work import Case, Work

DEVICE = os.environ.get("DIFFUSION_EXT_BENCH_DEVICE") or (
    "cuda" if torch.cuda.is_available() else "cpu"
)
LAYOUTS = ("contiguous", "channels_last")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Sizes:
    steps: list[tuple[int, ...]]
    norms: dict[tuple[int, ...], int]  # shape -> groups
    networks: Networks
    more_networks: tuple[Networks, ...]  # whose forward alone is timed
    diffusers: tuple[diffusers_networks.DiffusersNetwork, ...]
    transformers: tuple[transformers.Transformer, ...]
    pictures: tuple[int, ...]
    channels: tuple[int, ...]


# steps: latents and pictures in batches; the course's pictures, where the call itself counts.
WHOLE = Sizes(
    steps=[(64, 4, 64, 64), (64, 3, 128, 128), (32, 3, 16, 16)],
    norms=dict.fromkeys(NORM_SHAPES, GROUPS) | MORE_SHAPES,
    networks=Networks(DEVICE),
    more_networks=(Networks(DEVICE, batch=1), Networks(DEVICE, n_feat=256, height=28, batch=8)),
    diffusers=diffusers_networks.WHOLE,
    transformers=transformers.WHOLE,
    pictures=(4, 3, 32, 32),
    channels=(32, 64),
)
# Every line of code, hardly any arithmetic.
QUICK = Sizes(
    steps=[(2, 4, 8, 8)],
    norms={(2, 16, 4, 4): 8, (1, 8, 2, 4, 4): 4},
    networks=Networks(DEVICE, n_feat=8, height=8, batch=2, steps=2),
    more_networks=(),
    diffusers=diffusers_networks.QUICK,
    transformers=transformers.QUICK,
    pictures=(2, 3, 8, 8),
    channels=(8, 16),
)
# A cold compilation takes 10 to 40 seconds on two cores: the norms that a target is about.
COMPILED_NORMS = ((8, 320, 64, 64), *MORE_SHAPES)
HALF_NORMS = ((8, 320, 64, 64), (32, 256, 16, 16))


def of_steps(make: Callable[[Case], list[Work]]) -> Callable[[Sizes], list[Work]]:
    def works(sizes: Sizes) -> list[Work]:
        cases = [Case(shape, device=DEVICE) for shape in sizes.steps]
        cases += [Case(sizes.steps[0], dtype, device=DEVICE) for dtype in HALVES]
        return [work for case in cases for work in make(case)]

    return works


def of_norms(sizes: Sizes) -> list[Work]:
    works = []
    for shape, groups in sizes.norms.items():
        for layout in LAYOUTS:
            works += norms(Case(shape, "float32", layout, DEVICE), groups)
            for dtype in HALVES if shape in HALF_NORMS or sizes is QUICK else ():
                works += norms(Case(shape, dtype, layout, DEVICE), groups)[:1]
    return works


# The tests' names, and the works of each.
TESTS = {
    "sampler_step": of_steps(sampler_steps),
    "perturb": of_steps(perturbs),
    "denoising_loss": of_steps(objectives),
    "philox_normal": of_steps(lambda case: [normals(case)]),
    "group_norm_act": of_norms,
    "forward": lambda sizes: [
        work for networks in (sizes.networks, *sizes.more_networks) for work in forwards(networks)
    ],
    "diffusers_forward": lambda sizes: diffusers_networks.forwards(sizes.diffusers, DEVICE),
    "transformer_forward": lambda sizes: diffusers_networks.forwards(sizes.transformers, DEVICE),
    "training_step": lambda sizes: trainings(sizes.networks),
    "sampling": lambda sizes: samplings(sizes.networks),
    "pipeline": lambda sizes: pipelines(Case(sizes.pictures, device=DEVICE), sizes.channels),
}


def works(test: str, quick: bool) -> list[Work]:
    return [with_warm_heap(work) for work in TESTS[test](QUICK if quick else WHOLE)]


def find(test: str, name: str, quick: bool) -> Work:
    """The work of a name, for a process of its own."""
    return next(work for work in works(test, quick) if work.name == name)


def with_warm_heap(work: Work) -> Work:
    """On the CPU, where memory counts most: the same in a process that keeps what it has freed."""
    wanted = work.op in ("sampler_step", "perturb", "group_norm_act")
    if not wanted or (work.case.device, work.case.dtype) != ("cpu", "float32"):
        return work
    warm = {
        f"{name}, warm heap": replace(work.implementations[name], around=warm_heap)
        for name in ("eager", "ours")
    }
    return replace(work, implementations=work.implementations | warm)


def compiled_too(work: Work, quick: bool) -> bool:
    """Whether the rows under torch.compile are worth their seconds."""
    case, large = work.case, WHOLE.steps[0]
    if quick:
        return (work.op, work.variant, case.dtype) == ("perturb", "noise given", "float32")
    if case.dtype != "float32":
        return False
    if work.op == "group_norm_act":
        return case.shape in (HALF_NORMS[1:] if work.backward else COMPILED_NORMS)
    return case.shape == large if work.op in ("perturb", "philox_normal") else True


def is_worthwhile(work: Work, name: str, quick: bool) -> bool:
    if name == "reference":  # of large tensors it takes seconds, and nobody runs it for its speed
        return work.case.bytes <= 1 << 24
    return compiled_too(work, quick) or not work.implementations[name].compiles


def rows(test: str, quick: bool) -> list[tuple[Work, str]]:
    """(work, implementation), those of a work one after the other."""
    return [
        (work, name)
        for work in works(test, quick)
        for name in work.implementations
        if is_worthwhile(work, name, quick)
    ]
