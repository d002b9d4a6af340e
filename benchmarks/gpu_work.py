"""What gpu_bench.py times: each op at the sizes that people run, beside the formula it replaces."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import eager
import numpy as np
import torch
from harness import lay
from torch import Tensor

import diffusion_ext as dx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")

LARGE = (2048, 4, 64, 64)  # 134 MB in float32, 67 MB at 16 bits
LATENT = (4, 4, 64, 64)
GROUPS = 32
# DDPM and Stable Diffusion at batches of 8, 2 and 1; VAE decoders; 32 pixels; video.
NORM_SHAPES = [
    (8, 320, 64, 64),
    (8, 640, 32, 32),
    (8, 1280, 16, 16),
    (8, 1280, 8, 8),
    (2, 320, 64, 64),
    (1, 320, 64, 64),
    (1, 512, 64, 64),
    (1, 256, 256, 256),
    (1, 128, 512, 512),
    (64, 128, 32, 32),
    (1, 320, 16, 40, 64),
    (1, 128, 20, 128, 128),
]


@dataclass(frozen=True)
class Work:
    """One row of the table: fused(*inputs()) does what baseline(*inputs()) does.

    Attributes:
        op, variant: what it is. scale: "large", "latent" or "norm", which the targets go by.
        inputs: makes one set of arguments; the first is x.
        passes: tensors of x's size that have to be read or written; eager_passes: those of the
            baseline's kernels, where they are known.
        backward: fused and baseline end with gradients.
        random: the baseline draws noise of its own: its result is another one each time.
    """

    op: str
    variant: str
    scale: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    inputs: Callable[[], tuple]
    fused: Callable
    baseline: Callable
    passes: int
    eager_passes: int | None = None
    backward: bool = False
    random: bool = False

    @property
    def name(self) -> str:
        sizes = "×".join(str(n) for n in self.shape)
        return f"{self.op}, {self.variant}, {sizes} {self.dtype} {self.layout}"

    @property
    def bytes(self) -> int:
        """That have to be moved."""
        return self.passes * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def expected(self, *inputs):
        """The result in float64, which the reference serves."""
        return self.fused(*(t.double() if t.is_floating_point() else t for t in inputs))


# --- sampler_step -------------------------------------------------------------------------------


def one_row(timestep: int, clip: float | None = None, **weights: float) -> dx.StepTable:
    columns = [weights.get(name, 0.0) for name in dx.samplers.COLUMNS]
    return dx.StepTable(np.array([timestep]), np.array([columns]), clip, eager.SCHEDULE.timesteps)


def tables() -> dict[str, dx.StepTable]:
    """The rows that eager.py's formulas are."""
    kx, km = 1 / eager.SIGNAL, -eager.SIGMA / eager.SIGNAL
    ddpm, row = dx.ddpm(eager.SCHEDULE), eager.SCHEDULE.timesteps - eager.STEP
    weights = dict(zip(dx.samplers.COLUMNS, ddpm.weights[row].tolist(), strict=True))
    ddim = {"kx": kx, "km": km, "a0": eager.NEXT_SIGNAL, "am": eager.NEXT_SIGMA}
    return {
        "DDIM + clip": one_row(eager.STEP, eager.CLIP, **ddim),
        "DDPM": one_row(eager.STEP, **weights),
    }


def sampler_steps(common, shape, device) -> list[Work]:
    draw, table = drawing(common, device), tables()
    both = (2 * shape[0], *shape[1:])
    row = torch.zeros((), dtype=torch.int64, device=device)

    def ddim(x, m):
        of = table["DDIM + clip"]
        return dx.sampler_step(x, m, *of.tensors(x.device, x.dtype), row, clip=of.clip)

    def ddpm(x, m, noise=None, seeds=None, guidance=1.0):
        tensors = table["DDPM"].tensors(x.device, x.dtype)
        return dx.sampler_step(x, m, *tensors, row, noise, seeds, guidance=guidance)

    def seeds():
        return torch.arange(shape[0], device=device)

    common = {"op": "sampler_step", "shape": shape, **common}
    return [
        Work(
            variant="DDIM + clip, no noise",
            inputs=lambda: (draw(shape), draw(shape)),
            fused=ddim,
            baseline=eager.ddim_clipped,
            passes=3,
            eager_passes=16,
            **common,
        ),
        Work(
            variant="DDPM, noise given",
            inputs=lambda: (draw(shape), draw(shape), draw(shape)),
            fused=ddpm,
            baseline=eager.ddpm,
            passes=4,
            eager_passes=19,
            **common,
        ),
        Work(
            variant="DDPM, noise made",
            inputs=lambda: (draw(shape), draw(shape), seeds()),
            fused=lambda x, m, seeds: ddpm(x, m, seeds=seeds),
            baseline=lambda x, m, seeds: eager.ddpm(x, m),
            passes=3,
            eager_passes=20,
            random=True,
            **common,
        ),
        Work(
            variant="DDPM + guidance, noise made",
            inputs=lambda: (draw(shape), draw(both), seeds()),
            fused=lambda x, m, seeds: ddpm(x, m, seeds=seeds, guidance=eager.GUIDANCE),
            baseline=lambda x, m, seeds: eager.guided_ddpm(x, m),
            passes=4,
            eager_passes=28,
            random=True,
            **common,
        ),
    ]


# --- perturb, philox_normal ---------------------------------------------------------------------


def perturbs(common, shape, device) -> list[Work]:
    draw = drawing(common, device)
    t = torch.arange(shape[0], device=device) % (eager.SCHEDULE.timesteps + 1)
    signal, sigma = (
        eager.SCHEDULE.tensor(name, torch.device(device), DTYPES[common["dtype"]])
        for name in ("signal", "sigma")
    )
    common = {"op": "perturb", "shape": shape, "passes": 3, **common}

    return [
        Work(
            variant="noise given",
            inputs=lambda: (draw(shape), draw(shape)),
            fused=lambda x0, z: dx.perturb(x0, t, eager.SCHEDULE, noise=z)[0],
            baseline=lambda x0, z: eager.perturb(x0, signal[t], sigma[t], z)[0],
            eager_passes=7,
            **common,
        ),
        Work(
            variant="noise made",
            inputs=lambda: (draw(shape), torch.arange(shape[0], device=device)),
            fused=lambda x0, seeds: dx.perturb(x0, t, eager.SCHEDULE, seeds=seeds),
            baseline=lambda x0, seeds: eager.perturb(x0, signal[t], sigma[t]),
            eager_passes=8,
            random=True,
            **common,
        ),
    ]


def normals(common, shape, device) -> Work:
    draw = drawing(common, device)
    return Work(
        op="philox_normal",
        variant="noise made",
        shape=shape,
        inputs=lambda: (draw(shape), torch.arange(shape[0], device=device)),
        fused=lambda like, seeds: dx.philox_normal(seeds, shape, dtype=like.dtype),
        baseline=lambda like, seeds: torch.randn_like(like),
        passes=1,
        eager_passes=1,
        random=True,
        **common,
    )


# --- group_norm_act -----------------------------------------------------------------------------


def gradients(forward, x, weight, bias, dy):
    """The result, and the gradients of a forward with respect to its three inputs."""
    y = forward(x, weight, bias)
    return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))


def group_norm(x, weight, bias):
    return dx.group_norm_act(x, GROUPS, weight, bias)


def eager_group_norm(x, weight, bias):
    return eager.group_norm_silu(x, GROUPS, weight, bias)


def norms(common, shape, device) -> list[Work]:
    draw = drawing(common, device)

    def inputs():
        return draw(shape), draw(shape[1:2]), draw(shape[1:2])

    def with_gradients():
        return *(t.requires_grad_() for t in inputs()), draw(shape)

    common = {"op": "group_norm_act", "shape": shape, **common}
    forward = Work(
        variant="forward",
        inputs=inputs,
        fused=group_norm,
        baseline=eager_group_norm,
        passes=2,
        eager_passes=5,
        **common,
    )
    both = Work(
        variant="forward + backward",
        inputs=with_gradients,
        fused=partial(gradients, group_norm),
        baseline=partial(gradients, eager_group_norm),
        passes=5,
        backward=True,
        **common,
    )
    return [forward, both]


def compiled(work: Work) -> Work:
    """The same with its baseline compiled; the gradients of a forward stay outside."""
    options = {"fullgraph": True, "dynamic": False}
    if work.backward:
        compiled_forward = torch.compile(eager_group_norm, **options)
        return dataclasses.replace(work, baseline=partial(gradients, compiled_forward))
    return dataclasses.replace(work, baseline=torch.compile(work.baseline, **options))


def drawing(common, device) -> Callable[[tuple[int, ...]], Tensor]:
    """Makes normals of a shape, in the dtype and layout of a work."""

    def draw(shape):
        x = torch.randn(shape, dtype=DTYPES[common["dtype"]], device=device)
        return lay(x, common["layout"])

    return draw


def small(shape):
    """For the CPU that stands in for a GPU."""
    return (min(shape[0], 2), min(shape[1], 64), *(min(n, 4) for n in shape[2:]))


def all_work(device: str) -> list[Work]:
    size = small if device == "cpu" else tuple
    norm_shapes = dict.fromkeys(size(shape) for shape in NORM_SHAPES)
    works = []
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        for scale, shape in (("large", LARGE), ("latent", LATENT)):
            common = {"scale": scale, "dtype": dtype, "layout": layout}
            works += sampler_steps(common, size(shape), device)
            works += perturbs(common, size(shape), device)
            if layout == "contiguous":  # the only one that philox_normal gives
                works.append(normals(common, size(shape), device))
    for shape, dtype, layout in itertools.product(norm_shapes, DTYPES, LAYOUTS):
        common = {"scale": "norm", "dtype": dtype, "layout": layout}
        works += norms(common, shape, device)
    return works
