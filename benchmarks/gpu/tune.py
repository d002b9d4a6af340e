"""Times the variants of the CUDA kernels (variants.py) side by side on the GPU at hand.

    python -m benchmarks.gpu.tune --results FOLDER

Writes <device>/tune.json and tune.md: each work's times by variant, which constant won by how much,
and csrc/cuda/tuning.h as this device would have it. Every result is compared with the float64
reference before it is timed. With --device cpu the emulated GPU stands in, whose times say nothing.
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
from ..steps import normals, perturbs, sampler_steps
from ..work import Case, Check, Work
from . import winners
from .passes import Passes, main, one_line
from .timing import CudaClock, HostClock, measure, sets_for
from .variants import ELEMENTWISE, NORM, VARIANTS, Variant, folder_of

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


def contests(device: str) -> list[Contest]:
    """What a user runs most comes first."""
    small = device == "cpu"
    found = []
    for shape in [(2, 64, 4, 4)] if small else NORM_SHAPES:
        for layout in LAYOUTS:
            case = Case(shape, "bfloat16", layout, device, "norm")
            found += [Contest(NORM, work, GROUPS) for work in norms(case)]
    steps = []
    for shape in [(2, 4, 8, 8)] if small else (LARGE, LATENT):
        for layout in LAYOUTS:
            case = Case(shape, "bfloat16", layout, device, "large")
            works = [work for work in sampler_steps(case) if work.variant in STEPS]
            works += [work for work in perturbs(case) if work.random]
            works += [normals(case)] if layout == "contiguous" else []
            steps += [Contest(ELEMENTWISE, work) for work in works]
    return found + steps


def checks(device: str) -> Iterator[Contest]:
    """Small works that reach every kernel: by vectors and by elements, each plan, each layout."""
    for layout in LAYOUTS:
        for shape, groups in NORMS:
            case = Case(shape, "bfloat16", layout, device)
            yield from (Contest(NORM, work, groups) for work in norms(case, groups))
        for shape in ((3, 5, 7, 3), (2, 8, 9, 4), (2, 4, 40, 40)):
            case = Case(shape, "bfloat16", layout, device)
            works = [*sampler_steps(case), *perturbs(case)]
            yield from (Contest(ELEMENTWISE, work) for work in works)


def loaded(device: str) -> tuple[list[Variant], list[str]]:
    """The variants whose libraries load, each a backend by its library's name; and why not."""
    good, errors = [], []
    for variant in VARIANTS:
        try:
            torch.ops.load_library(str(folder_of(device) / f"{variant.library}.so"))
        except OSError as error:
            errors.append(f"{variant.library}: {one_line(error)}")
            continue
        backend.NAMESPACES[variant.library] = variant.namespace
        good.append(variant)
    return good, errors


class Tune(Passes):
    report_of, default_seconds = winners.TuneReport, 90

    @staticmethod
    def works(device: str) -> list[Contest]:
        return contests(device)

    def __init__(self, device: str, results, seconds: float):
        super().__init__(device, results, seconds)
        self.clock = CudaClock() if device == "cuda" else HostClock()
        self.variants, self.report.errors = loaded(device)
        self.failed = bool(self.report.errors)
        self.reject_wrong_ones()

    def of(self, op: str) -> list[Variant]:
        return [variant for variant in self.variants if variant.op == op]

    def reject_wrong_ones(self) -> None:
        """Drops the variants whose results are off, and says so."""
        for contest in checks(self.device):
            inputs = contest.work.inputs()
            check = Check(contest.work, inputs)
            for variant in self.of(contest.op):
                try:
                    with dx.use_backend(variant.library):
                        ours = contest.work.implementations["ours"]
                        check.error_of(ours, ours.make(*inputs))
                except Exception as error:
                    self.reject(variant, contest, error)

    def reject(self, variant: Variant, contest: Contest, error: Exception) -> None:
        self.report.errors.append(f"{variant.library}: {contest.name}: {one_line(error)}")
        self.variants.remove(variant)
        self.failed = True

    def row(self, contest: Contest) -> dict:
        case = contest.work.case
        row = {"op": contest.op, "work": contest.work.op, "variant": contest.work.variant}
        row |= {"shape": case.shape, "layout": case.layout, "backward": contest.work.backward}
        if contest.op == NORM:
            options = {"channels_last": case.layout == "channels_last", **limits(self.device)}
            back = contest.work.backward
            plan = _C.group_norm_plan(list(case.shape), contest.groups, 2, backward=back, **options)
            row["plan"] = plan["kind"]
        return {**row, "us": {}}

    def measure(self, contest: Contest, row: dict) -> None:
        work = contest.work
        sets = [work.inputs() for _ in range(sets_for(self.clock, work.bytes))]
        check = Check(work, sets[0])
        ours = work.implementations["ours"]
        for variant in self.of(contest.op):
            with dx.use_backend(variant.library):
                call = ours.make(*sets[0])
                try:
                    check.error_of(ours, call)
                except Exception as error:
                    self.reject(variant, contest, error)
                    continue
                row["us"][variant.name] = 1e6 * measure(call, sets, self.clock).best

    def every_compiled(self, done, most) -> None:
        """There is no torch.compile here."""

    def said_of(self, row: dict) -> str:
        if not row["us"]:
            return "no variant is right"
        best = min(row["us"], key=row["us"].get)
        return f"as it is {row['us'].get('as_it_is', 0):.2f} µs, {best} {row['us'][best]:.2f} µs"


if __name__ == "__main__":
    sys.exit(main(Tune, __doc__))
