"""Times every op on the GPU at hand and writes benchmarks/results/<device>/ops.json and ops.md.

gpu_check.py runs it. Two passes over the work: everything but torch.compile, then as many compiled
baselines as the time allows, those that a target is about first.
"""

from __future__ import annotations

import sys

import torch

from diffusion_ext import _C

from ..device import issue_rate, limits
from ..norms import GROUPS
from ..work import DTYPES, Check, Work
from .passes import Passes, main
from .report import OpsReport
from .timing import Clock, measure, sets_for
from .work import all_work, baseline


class Bench(Passes):
    report_of, compiles_failed = OpsReport, False

    def __init__(self, arguments):
        super().__init__(arguments)
        self.clock = Clock()

    def works(self) -> list[Work]:
        return all_work()

    def kind(self, work: Work, part: str) -> str:
        name = f"{work.op}, {work.variant}, {work.case.dtype}, {work.case.layout}"
        return f"{name}, compiled" if part else name

    def rank(self, work: Work) -> int:
        """What a target is about first, as it is mostly run."""
        scale = work.case.scale
        if work.case.layout != "contiguous":
            return 5 if scale == "norm" and not work.backward else 6
        if scale != "norm":
            return 1 if scale == "latent" else 3
        return (4 if work.backward else 2) if work.case.dtype == "bfloat16" else 5

    def sets(self, work: Work) -> list[tuple]:
        return [work.inputs() for _ in range(sets_for(self.clock, work.bytes))]

    def row(self, work: Work) -> dict:
        fields = ("op", "variant", "passes", "eager_passes", "backward", "bytes")
        row = {name: getattr(work, name) for name in fields}
        row |= {name: getattr(work.case, name) for name in ("scale", "shape", "dtype", "layout")}
        if work.op == "group_norm_act":
            row |= {"groups": GROUPS, "plan": self.plans(work)}
        row |= {"compile": "not tried", "note": "", "issue_rate": issue_rate()}
        return row

    def plans(self, work: Work) -> dict[str, dict]:
        case, of = work.case, limits()
        size, last = DTYPES[case.dtype].itemsize, case.layout == "channels_last"
        plans = {}
        for name, backward in (("forward", False), ("backward", True))[: 1 + work.backward]:
            options = {"channels_last": last, "backward": backward, **of}
            plans[name] = _C.group_norm_plan(list(case.shape), GROUPS, size, **options)
        return plans

    def take(self, row: dict, name: str, call, sets) -> None:
        times = measure(call, sets, self.clock)
        row.setdefault("call_us", {})[name] = 1e6 * times.call
        row.setdefault("device_us", {})[name] = 1e6 * times.best
        if times.note:
            row["note"] = ", ".join(filter(None, [row["note"], f"{name}: {times.note}"]))

    def measure(self, work: Work, row: dict, _) -> None:
        sets = self.sets(work)
        check = Check(work, sets[0])
        copies = [(torch.empty_like(s[0].detach()), s[0].detach()) for s in sets]
        self.take(row, "copy", torch.Tensor.copy_, copies)
        for name, one in (("fused", work.implementations["ours"]), ("eager", baseline(work))):
            call = one.make(*sets[0])
            check.error_of(one, call)
            self.take(row, name, call, sets)

    def compile(self, work: Work, row: dict, _) -> None:
        sets, quick = self.sets(work), work.implementations["compiled"]
        call = quick.make(*sets[0])
        Check(work, sets[0]).error_of(quick, call)
        self.take(row, "compiled", call, sets)

    @staticmethod
    def said_of(row: dict) -> str:
        return ", ".join(f"{name} {us:.1f} µs" for name, us in row["device_us"].items())


if __name__ == "__main__":
    sys.exit(main(__spec__.name, Bench, __doc__))
