"""Times every op on the GPU at hand and writes benchmarks/results/<device>/ops.json and ops.md.

gpu_check.py runs it. Two passes over the work: everything but torch.compile, then as many compiled
baselines as the time allows, those that a target is about first.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import sys
import time
import warnings

import torch

from diffusion_ext import _C

from ..device import facts, limits
from ..norms import GROUPS
from ..work import DTYPES, Check, Work
from .report import Report
from .targets import summary
from .timing import CudaClock, HostClock, measure, sets_for
from .work import all_work, baseline

COMPILE_SECONDS = 60  # for one baseline


def one_line(error: BaseException) -> str:
    """Without the paths of a machine and what a table takes for itself."""
    said = re.sub(r"\S*/\S+|\|", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {' '.join(said.split())[:100]}"


def compile_rank(work: Work) -> int:
    """The order in which torch.compile is tried: what a target is about, as it is mostly run."""
    scale = work.case.scale
    if work.case.layout != "contiguous":
        return 5 if scale == "norm" and not work.backward else 6
    if scale != "norm":
        return 1 if scale == "latent" else 3
    return (4 if work.backward else 2) if work.case.dtype == "bfloat16" else 5


class Bench:
    def __init__(self, device: str, report: Report, seconds: float):
        self.clock = CudaClock() if device == "cuda" else HostClock()
        self.device, self.report = device, report
        self.end = time.monotonic() + seconds
        self.failed = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def sets(self, work: Work) -> list[tuple]:
        return [work.inputs() for _ in range(sets_for(self.clock, work.bytes))]

    def row(self, work: Work) -> dict:
        fields = ("op", "variant", "passes", "eager_passes", "backward", "bytes")
        row = {name: getattr(work, name) for name in fields}
        row |= {name: getattr(work.case, name) for name in ("scale", "shape", "dtype", "layout")}
        if work.op == "group_norm_act":
            row |= {"groups": GROUPS, "plan": self.plans(work)}
        row |= {"compile": "not tried", "note": ""}
        return row

    def plans(self, work: Work) -> dict[str, dict]:
        case, of = work.case, limits(self.device)
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

    def measure(self, work: Work, row: dict) -> None:
        sets = self.sets(work)
        check = Check(work, sets[0])
        copies = [(torch.empty_like(s[0].detach()), s[0].detach()) for s in sets]
        self.take(row, "copy", torch.Tensor.copy_, copies)
        for name, one in (("fused", work.implementations["ours"]), ("eager", baseline(work))):
            call = one.make(*sets[0])
            check.error_of(one, call)
            self.take(row, name, call, sets)

    def compile(self, work: Work, row: dict) -> None:
        sets, quick = self.sets(work), work.implementations["compiled"]
        call = quick.make(*sets[0])
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, min(COMPILE_SECONDS, max(self.left(), 1)))
        try:
            Check(work, sets[0]).error_of(quick, call)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.take(row, "compiled", call, sets)
        row["compile"] = "compiled"

    def every(self, works: list[Work]) -> list[tuple[Work, dict]]:
        """Pass one."""
        done = []
        for work in works:
            if self.left() < 2:
                print(f"out of time: {len(works) - len(done)} rows not measured", flush=True)
                self.failed = True
                break
            row = self.row(work)
            self.report.rows.append(row)
            try:
                self.measure(work, row)
            except Exception as error:
                row["error"], self.failed = one_line(error), True
            done.append((work, row))
            self.report.write()
            print(f"{work.name}: {said_of(row)}", flush=True)
        return done

    def every_compiled(self, done: list[tuple[Work, dict]], most: int) -> None:
        """Pass two."""
        todo = sorted(
            ((work, row) for work, row in done if "error" not in row),
            key=lambda item: compile_rank(item[0]),
        )
        for i, (work, row) in enumerate(todo):
            if i >= most or self.left() < 10:
                print(f"torch.compile not tried for {len(todo) - i} rows", flush=True)
                break
            try:
                self.compile(work, row)
            except Exception as error:
                row["compile"] = one_line(error)
            self.report.write()
            print(f"{work.name}: {said_of(row)}, compiled", flush=True)


def out_of_time(*_):
    raise TimeoutError("torch.compile took too long")


def said_of(row: dict) -> str:
    if "error" in row:
        return row["error"]
    return ", ".join(f"{name} {us:.1f} µs" for name, us in row["device_us"].items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=pathlib.Path, required=True)
    seconds = float(os.environ.get("GPU_CHECK_SECONDS", 500))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.compile's advice
    torch.manual_seed(0)
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)  # as much as such small tensors need
    report = Report(arguments.results, facts(device))
    bench = Bench(device, report, 0.95 * seconds - 5)
    done = bench.every(all_work(device))
    bench.every_compiled(done, most=len(done) if device == "cuda" else 1)
    report.write(complete=not bench.failed)
    print(f"{report.folder.name}/ops.json and ops.md: {len(done)} rows")
    for t in summary(report.rows):
        print(f"{t['met']}/{t['rows']} {t['target']} {t['wanted']}, worst {t['worst']:.2f}")
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
