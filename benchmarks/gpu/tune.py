"""Times the variants of the CUDA kernels (variants.py) side by side on the GPU at hand.

    python -m benchmarks.gpu.tune --results FOLDER

Writes <device>/tune.json and tune.md: each work's times by variant, which constant won by how much,
and csrc/cuda/tuning.h as this device would have it. Every result is compared with the float64
reference before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from calls import NORMS

import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops import backend

from ..device import limits
from ..norms import GROUPS, norms
from ..objective import losses
from ..steps import normals, perturbs, sampler_steps
from ..work import Case, Check, Work
from . import winners
from .child import one_line
from .items import Done, Item
from .passes import Measuring, Passes, main
from .stand_in import STAND_IN
from .timing import Clock, measure, sets_for
from .variants import CHOSEN, ELEMENTWISE, NORM, Variant, folder_of

NORM_SHAPES = [
    (2, 320, 64, 64),
    (8, 1280, 16, 16),
    (1, 256, 256, 256),
    (8, 320, 64, 64),
    (8, 1280, 8, 8),
    (1, 128, 512, 512),
]
LARGE, LATENT = (1024, 4, 64, 64), (4, 4, 64, 64)
LAYOUTS = ("contiguous", "channels_last")
STEPS = ("DDIM + clip", "DDPM, noise made")


@dataclass(frozen=True)
class Contest:
    """A work, and the op whose variants do it. groups: of a norm."""

    op: str
    work: Work
    groups: int = 0

    @property
    def name(self) -> str:
        return self.work.name

    @property
    def dtype(self) -> str:
        return self.work.dtype


def contests() -> list[Contest]:
    """What a user runs most comes first."""
    found = []
    for shape in [(2, 64, 4, 4)] if STAND_IN else NORM_SHAPES:
        for layout in LAYOUTS:
            case = Case(shape, "bfloat16", layout, "cuda", "norm")
            found += [Contest(NORM, work, GROUPS) for work in norms(case)]
    steps = []
    for shape in [(2, 4, 8, 8)] if STAND_IN else (LARGE, LATENT):
        for layout in LAYOUTS:
            case = Case(shape, "bfloat16", layout, "cuda", "large")
            works = [work for work in sampler_steps(case) if work.variant in STEPS]
            works += [work for work in perturbs(case) if work.random]
            works += losses(case)[:1]
            works += [normals(case)] if layout == "contiguous" else []
            steps += [Contest(ELEMENTWISE, work) for work in works]
    return found + steps


def checks() -> Iterator[Contest]:
    """Small works that reach every kernel: by vectors and by elements, each plan, each layout."""
    for layout in LAYOUTS:
        for shape, groups in NORMS:
            case = Case(shape, "bfloat16", layout, "cuda")
            yield from (Contest(NORM, work, groups) for work in norms(case, groups))
        for shape in ((3, 5, 7, 3), (2, 8, 9, 4), (2, 4, 40, 40)):
            case = Case(shape, "bfloat16", layout, "cuda")
            works = [*sampler_steps(case), *perturbs(case), *losses(case)]
            yield from (Contest(ELEMENTWISE, work) for work in works)


class Tune(Passes):
    """Each variant of a contest is a part of its row."""

    report_of, seconds = winners.TuneReport, 15

    def __init__(self, arguments):
        super().__init__(arguments)
        self.clock = Clock()
        self.variants = {variant.library: variant for variant in CHOSEN}
        self.checks = None  # [(contest, its check)], made by the first variant that wants them
        self.last = ("", None)  # the contest that is being timed, with (check, sets)

    def works(self) -> list[Contest]:
        return contests()

    def kind(self, contest: Contest, part: str) -> str:
        return Variant(contest.op, part).library

    def parts(self, contest: Contest) -> tuple[str, ...]:
        return tuple(v.name for v in CHOSEN if v.op == contest.op)

    def compiled_parts(self, contest: Contest) -> tuple[str, ...]:
        return ()

    def items(self) -> list[Item]:
        """Every variant's small works first, which load it."""
        first = [
            Item(f"{library}: the small works", library, 60, about={"small": library})
            for library in self.variants
        ]
        return first + super().items()

    def do(self, name: str, given: dict) -> None:
        if library := given.get("small"):
            self.check_small_works(self.variants[library])
        else:
            super().do(name, given)

    def check_small_works(self, variant: Variant) -> None:
        self.load(variant)
        if self.checks is None:
            found = list(checks())
            self.checks = [
                (contest, Check(contest.work, contest.work.inputs())) for contest in found
            ]
        for contest, check in self.checks:
            if contest.op == variant.op:
                try:
                    self.checked(variant, contest.work, check)
                except Exception as error:
                    error.args = (f"{contest.name}: {one_line(error)}",)
                    raise

    def load(self, variant: Variant) -> None:
        """Its library is a backend of the same name."""
        if variant.library not in backend.NAMESPACES:
            torch.ops.load_library(str(folder_of(STAND_IN) / f"{variant.library}.so"))
            backend.NAMESPACES[variant.library] = variant.namespace

    def checked(self, variant: Variant, work: Work, check: Check):
        """The work's call, by a variant. Raises: AssertionError where its result is off."""
        ours = work.implementations["ours"]
        with dx.use_backend(variant.library):
            call = ours.make(*check.inputs)
            check.error_of(ours, call)
        return call

    def row(self, contest: Contest) -> dict:
        case = contest.work.case
        row = {"op": contest.op, "work": contest.work.op, "variant": contest.work.variant}
        row |= {"shape": case.shape, "layout": case.layout, "backward": contest.work.backward}
        if contest.op == NORM:
            options = {"channels_last": case.layout == "channels_last", **limits()}
            back = contest.work.backward
            plan = _C.group_norm_plan(list(case.shape), contest.groups, 2, backward=back, **options)
            row["plan"] = plan["kind"]
        return {**row, "us": {}}

    def measure(self, contest: Contest, row: dict, part: str) -> None:
        work, variant = contest.work, self.variants[self.kind(contest, part)]
        self.load(variant)
        if self.last[0] != contest.name:
            sets = [work.inputs() for _ in range(sets_for(self.clock, work.bytes))]
            self.last = contest.name, (Check(work, sets[0]), sets)
        check, sets = self.last[1]
        call = self.checked(variant, work, check)
        with dx.use_backend(variant.library):
            row["us"][part] = 1e6 * measure(call, sets, self.clock, launches=False).best

    @staticmethod
    def said_of(row: dict) -> str:
        if not row["us"]:
            return "no variant is right"
        best = min(row["us"], key=row["us"].get)
        return f"as it is {row['us'].get('as_it_is', 0):.2f} µs, {best} {row['us'][best]:.2f} µs"


class Tuning(Measuring):
    """In the parent: a variant that failed once is not asked of the child any more."""

    def given(self, item: Item) -> dict:
        return item.about if "small" in item.about else super().given(item)

    def take(self, done: Done) -> None:
        if not done.error and "small" not in done.item.about:
            return super().take(done)
        self.failures.count(done)
        if done.error:
            print(f"Error: {done.item.name}: {done.error}", flush=True)
            self.run.queue[:] = [i for i in self.run.queue if i.kind != done.item.kind]


if __name__ == "__main__":
    sys.exit(main(__spec__.name, Tune, __doc__, Tuning))
