"""Every op once, in seconds: beside the float64 reference, and beside the CPU where bits agree.

gpu_check.py runs it first. Prints a line for each work that is off, and fails then.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from calls import NORMS, every_call
from harness import same_bits

from ..norms import norms
from ..steps import normals, perturbs, sampler_steps
from ..work import DTYPES, Case, Check, Work
from .passes import one_line

LAYOUTS = ("contiguous", "channels_last")
# No vector fits; vectors fit; several blocks, and four pixels of noise to a thread.
SHAPES = [(1, 7, 5, 3), (2, 8, 9, 4), (2, 4, 64, 64)]


def works(device: str) -> Iterator[Work]:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        for shape in SHAPES:
            case = Case(shape, dtype, layout, device)
            yield from (*sampler_steps(case), *perturbs(case))
            if layout == "contiguous":
                yield normals(case)
        for shape, groups in NORMS:
            yield from norms(Case(shape, dtype, layout, device), groups)


def check(work: Work) -> None:
    """Raises AssertionError where the work's result is off."""
    inputs, ours = work.inputs(), work.implementations["ours"]
    Check(work, inputs).error_of(ours, ours.make(*inputs))


def bits(dtype: torch.dtype, layout: str, shape: tuple[int, ...], device: str) -> Iterator[tuple]:
    """(name, what raises AssertionError where an op's bits are not the CPU's)"""
    for name, call in every_call(dtype, layout, shape).items():
        if name.startswith("group_norm_act"):
            continue

        def compare(call=call):
            inputs = call.draw()
            with torch.device(device):
                found = call.run(**{n: t.to(device, copy=True) for n, t in inputs.items()})
            for ours, theirs in zip(found, call.run(**inputs), strict=True):
                assert same_bits(ours.cpu(), theirs), "other bits than on the CPU"

        yield f"{name}, {dtype}, {layout}, {shape}", compare


def every_check(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for work in works(device):
        yield work.name, lambda work=work: check(work)
    for dtype, layout, shape in itertools.product(DTYPES.values(), LAYOUTS, SHAPES):
        yield from bits(dtype, layout, shape, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    count = failed = 0
    for name, run in every_check(device):
        count += 1
        try:
            run()
        except Exception as error:
            failed += 1
            print(f"Error: {name}: {one_line(error)}", flush=True)
    print(f"{count - failed} of {count} checks passed on {device}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
