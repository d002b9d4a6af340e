"""What both GPU benchmarks do: rows in two passes within a time, and their command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import signal
import time
import warnings

import torch

from ..device import facts
from .report import Report

COMPILE_SECONDS = 60  # for one baseline


class Passes:
    """Everything but torch.compile, then as many compiled baselines as the time allows.

    A work has a `name` and a `dtype`. Subclasses have report_of, the class of their report;
    default_seconds; works(device), row(work), measure(work, row), compile(work, row) and
    said_of(row).
    """

    report_of: type[Report]
    default_seconds: float
    compiled_on_cpu = 1  # works for which torch.compile is tried where a CPU stands in
    failure = "error"  # in a row: why it was not measured

    def __init__(self, device: str, results: pathlib.Path, seconds: float):
        self.device, self.report = device, self.report_of(results, facts(device))
        self.end = time.monotonic() + seconds
        self.failed = False

    def left(self) -> float:
        return self.end - time.monotonic()

    def rank(self, work) -> int:
        """When it is measured, and torch.compile tried for it: the lowest first."""
        return 0

    def every(self, works: list) -> list[tuple]:
        """Pass one: [(work, row)]."""
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
                row[self.failure], self.failed = one_line(error), True
            done.append((work, row))
            self._say(work, row)
        return done

    def every_compiled(self, done: list[tuple], most: int) -> None:
        """Pass two."""
        todo = [(work, row) for work, row in done if self.failure not in row]
        for i, (work, row) in enumerate(todo):
            if i >= most or self.left() < 10:
                print(f"torch.compile not tried for {len(todo) - i} rows", flush=True)
                break
            try:
                self.compile(work, row)
                row["compile"] = "compiled"
            except Exception as error:
                row["compile"] = one_line(error)
            self._say(work, row)

    def _say(self, work, row: dict) -> None:
        self.report.write()
        said = row[self.failure] if self.failure in row else self.said_of(row)
        print(f"{work.name}: {said}", flush=True)

    @contextlib.contextmanager
    def compiling(self):
        """A compilation that takes too long is given up."""
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, min(COMPILE_SECONDS, max(self.left(), 1)))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _out_of_time(*_):
    raise TimeoutError("torch.compile took too long")


def one_line(error: BaseException) -> str:
    """Without the paths of a machine and what a table takes for itself."""
    said = re.sub(r"\S*/\S+|\|", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {' '.join(said.split())[:100]}"


def main(passes: type[Passes], description: str) -> int:
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--dtype", help="only the works of this one, such as bfloat16")
    seconds = float(os.environ.get("GPU_CHECK_SECONDS", passes.default_seconds))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.compile's advice
    torch.manual_seed(0)
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)  # as much as such small tensors need
    bench = passes(device, arguments.results, 0.95 * seconds - 5)
    works = [w for w in passes.works(device) if arguments.dtype in (None, w.dtype)]
    done = bench.every(sorted(works, key=bench.rank))
    bench.every_compiled(done, most=len(done) if device == "cuda" else bench.compiled_on_cpu)
    report = bench.report
    report.write(complete=not bench.failed)
    print(f"{report.folder.name}/{report.name}.json and {report.name}.md: {len(done)} rows")
    print(*report.lines(), sep="\n")
    return int(bench.failed)
