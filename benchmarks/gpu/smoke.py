"""Every op once, in seconds: beside the float64 reference, and beside what the CPU makes of it.

gpu_check.py runs it first. Prints a line for each check that fails, and at the end equal ones
together, which is what the call's summary has.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from calls import NORMS, Call, every_call
from harness import same_bits
from torch import Tensor

from ..device import facts
from ..norms import norms
from ..objective import losses
from ..steps import normals, perturbs, sampler_steps
from ..work import DTYPES, Case, Check, Work
from .failures import Failures, not_run
from .items import Item, Run
from .stages import stage

LAYOUTS = ("contiguous", "channels_last")
# No vector fits; vectors fit; several blocks, and four pixels of noise to a thread.
SHAPES = [(1, 7, 5, 3), (2, 8, 9, 4), (2, 4, 64, 64)]
SECONDS = 8  # that a check may take: the first of a process makes the CUDA context


def works() -> Iterator[Work]:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        for shape in SHAPES:
            case = Case(shape, dtype, layout, "cuda")
            yield from (*sampler_steps(case), *perturbs(case), *losses(case))
            if layout == "contiguous":
                yield normals(case)
        for shape, groups in NORMS:
            yield from norms(Case(shape, dtype, layout, "cuda"), groups)


def check(work: Work) -> None:
    """Raises AssertionError where the work's result is off."""
    inputs, ours = work.inputs(), work.implementations["ours"]
    Check(work, inputs).error_of(ours, ours.make(*inputs))


def beside_cpu(call: Call) -> None:
    """Raises AssertionError where a call gives something else than on the CPU."""
    inputs = call.draw()
    with torch.device("cuda"):
        found = call.run(**{name: tensor.cuda() for name, tensor in inputs.items()})
    for ours, theirs in zip(found, call.run(**inputs), strict=True):
        compare(ours.cpu(), theirs, call.tolerance)


def compare(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    if tolerance == 0:
        assert same_bits(ours, theirs), "other bits than on the CPU"
        return
    off = (ours.double() - theirs.double()).abs().max().item()
    # Inputs are of size 1; of a gradient that cancels, roundings of that size are left.
    limit = tolerance * max(theirs.abs().max().item(), 1.0)
    assert off <= limit, f"{off:.2e} from the CPU's result, above {limit:.2e}"


def every_check() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(name, kind, what raises AssertionError where something is off)"""
    for work in works():
        case = work.case
        name = f"{work.op}, {work.variant}, {case.layout}"
        yield work.name, name, lambda work=work: check(work)
    for dtype, layout, shape in itertools.product(DTYPES.values(), LAYOUTS, SHAPES):
        for name, call in every_call(dtype, layout, shape).items():
            if shape == SHAPES[0] or not name.startswith("group_norm_act"):  # of shapes of its own
                title = f"{name}, {shape}, {dtype}, {layout}, beside the CPU"
                kind = f"{name}, {layout}, beside the CPU"
                yield title, kind, lambda call=call: beside_cpu(call)


class Smoke:
    """In a child: see child.py."""

    def __init__(self, arguments: argparse.Namespace):
        torch.zeros(1, device="cuda").item()  # makes the CUDA context, which no check waits for
        self.checks = {name: (kind, run) for name, kind, run in every_check()}

    def facts(self) -> dict[str, str]:
        return facts("cuda")

    def items(self) -> list[Item]:
        return [Item(name, kind, SECONDS) for name, (kind, _) in self.checks.items()]

    def do(self, name: str, given: dict) -> None:
        _, run = self.checks[name]
        run()


def go_through(run: Run, arguments: argparse.Namespace) -> int:
    failures, passed = Failures(), 0
    for done in run:
        failures.count(done)
        passed += not done.error
        if done.error:
            print(f"Error: {done.item.name}: {done.error}", flush=True)
    lines = failures.lines() + not_run(run)
    print(*lines, f"{passed} of {run.total} checks passed", sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(stage(__spec__.name, __doc__, Smoke, go_through, 60))
