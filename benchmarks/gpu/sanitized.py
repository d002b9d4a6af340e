"""Every op on small tensors, one call after the other, for compute-sanitizer to watch.

gpu_check.py runs it with each of the tools, which stand before the child's command. Inputs are
drawn on the CPU and little of torch's own runs on the GPU, so that what a sanitizer says is about
our kernels. Each result is read as a whole, which is how initcheck notices an element that was
never written. The most telling calls come first; what the time is too short for is counted, and is
no failure.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys

import torch
from calls import NORMS, every_call

from diffusion_ext import _C

from ..device import limits
from .failures import Failures, not_run
from .items import LEAST, Item, Run
from .running import sanitizer
from .stages import stage

# No vector fits (1, 7, 5, 3); the others have channels and pixels that vectors divide.
SHAPES = [(2, 8, 9, 4), (1, 7, 5, 3), (2, 4, 8, 8)]
# Copying to a misaligned view is torch's work: contiguous, so that no vector fits.
LAYOUTS = ("contiguous", "channels_last", "misaligned contiguous", "misaligned channels_last")
DTYPES = (torch.float32, torch.bfloat16)
SHARED = ("group_norm_act", "denoising_loss")  # these have shared memory and barriers
OF_SHARED = ("racecheck", "synccheck")  # the tools that are about these
SECONDS, START = 60, 120  # a tool slows a launch 10 to 100 times, and an import of torch a few
EXIT = 86  # the tool's own exit status where it found something
FOUND = re.compile(r"=+ (?:Invalid|(?:Error: )?Race|Uninit|Barrier).*")
KERNELS = "the kernels of group_norm_act that are reached"


def kernels_reached() -> set[tuple]:
    """(kind, several parts, vectors, channels_last, backward) of NORMS on this GPU."""
    reached, flags = set(), (False, True)
    for (shape, groups), size, last, backward in itertools.product(NORMS, (2, 4), flags, flags):
        options = {"channels_last": last, "backward": backward, **limits()}
        plan = _C.group_norm_plan(shape, groups, size, **options)
        reached.add((plan["kind"], plan["parts"] > 1, plan["vector"] > 1, last, backward))
    return reached


def wanted() -> set[tuple]:
    """On chip in a block, in a cluster where there are any, split; each in every way."""
    kinds = [("on chip", False), ("split", True)]
    if limits()["max_cluster"] > 1:
        kinds.append(("on chip", True))
    return {(*kind, *rest) for kind in kinds for rest in itertools.product((False, True), repeat=3)}


class Watched:
    """In a child: see child.py."""

    def __init__(self, arguments: argparse.Namespace):
        self.calls, ranked = {}, []
        shared_first = arguments.tool in OF_SHARED
        for dtype, layout, shape in itertools.product(DTYPES, LAYOUTS, SHAPES):
            # One dtype, then the other; what lies as it should, then what does not.
            rank = (DTYPES.index(dtype), layout.startswith("misaligned"), SHAPES.index(shape))
            for name, call in every_call(dtype, layout, shape).items():
                if shape == SHAPES[0] or not name.startswith("group_norm_act"):
                    late = shared_first and not name.startswith(SHARED)
                    ranked.append(((late, *rank), f"{name}, {shape}, {dtype}, {layout}", call))
        for _, name, call in sorted(ranked, key=lambda one: one[0]):
            self.calls[name] = call

    def facts(self) -> dict[str, str]:
        return {}  # which would ask nvidia-smi, below the sanitizer

    def items(self) -> list[Item]:
        names = [KERNELS, *self.calls]
        return [Item(n, n.partition(", (")[0], SECONDS, optional=True) for n in names]

    def do(self, name: str, given: dict) -> None:
        if name == KERNELS:
            missing = wanted() - kernels_reached()
            assert not missing, f"no shape reaches {sorted(missing)}"
            return
        call = self.calls[name]
        with torch.device("cuda"):
            for result in call.run(**call.draw()):
                result + 0


def go_through(run: Run, arguments: argparse.Namespace) -> int:
    failures, found, watched = Failures(), {}, 0
    tool = arguments.tool or "no tool"

    def heard(line: str, item: Item | None) -> None:
        if FOUND.match(line):  # perhaps a moment after the item that it is about
            kind, name = (item.kind, item.name) if item else ("", "the start")
            found.setdefault((line.strip(), kind), name)

    run.heard, run.start = heard, START
    for done in run:
        failures.count(done)
        watched += done.item.name != KERNELS
        if done.error:
            print(f"Error: {done.item.name}: {done.error}", flush=True)
    lines = failures.lines()
    if run.left() > LEAST:  # a tool that has no time to start has found nothing
        lines += not_run(run)
    lines += [f"FAILED {line} (in or before {name})" for (line, _), name in found.items()][:20]
    if run.total == 0:
        lines.append(f"FAILED {tool} did not start: {run.broken}")
    if EXIT in run.statuses and not found:
        lines.append(f"FAILED {tool} found something: see the log")
    lines.append(f"{tool}: {watched} of {max(run.total - 1, 0)} calls watched")
    print(*lines, sep="\n")
    return int(len(lines) > 1)


def prefix(arguments: argparse.Namespace) -> list[str]:
    if not arguments.tool:
        return []
    command, options = sanitizer()
    return [command, "--tool", arguments.tool, *options]


if __name__ == "__main__":
    sys.exit(
        stage(__spec__.name, __doc__, Watched, go_through, 60, ("--tool",), prefix, 15),
    )
