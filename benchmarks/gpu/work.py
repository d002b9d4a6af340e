"""What gpu/bench.py times: each op at the sizes that people run, beside the formula it replaces.

And a training step of ContextUnet.
"""

from __future__ import annotations

import itertools

from ..networks import Networks, trainings
from ..norms import NORM_SHAPES, norms
from ..objective import losses
from ..steps import BY_X0, normals, perturbs, sampler_steps
from ..work import Case, Implementation, Work
from .stand_in import STAND_IN

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")

LARGE = (2048, 4, 64, 64)  # 134 MB in float32, 67 MB at 16 bits
LATENT = (4, 4, 64, 64)


def baseline(work: Work) -> Implementation:
    """The formula as schedulers have it, where that is another one: the targets are about it."""
    return work.implementations.get(BY_X0, work.implementations["eager"])


def small(shape):
    """For the stand-in for a GPU."""
    return (min(shape[0], 2), min(shape[1], 64), *(min(n, 4) for n in shape[2:]))


def all_work() -> list[Work]:
    size = small if STAND_IN else tuple
    norm_shapes = dict.fromkeys(size(shape) for shape in NORM_SHAPES)
    works = []
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        for scale, shape in (("large", LARGE), ("latent", LATENT)):
            case = Case(size(shape), dtype, layout, "cuda", scale)
            works += [w for w in sampler_steps(case) if w.variant != "DDIM, no noise"]
            works += perturbs(case) + losses(case)
            if layout == "contiguous":  # the only one that philox_normal gives
                works.append(normals(case))
    for shape, dtype, layout in itertools.product(norm_shapes, DTYPES, LAYOUTS):
        case = Case(shape, dtype, layout, "cuda", "norm")
        works += norms(case)
    return works + trainings(Networks("cuda", 8, 8, 2) if STAND_IN else Networks("cuda"))
