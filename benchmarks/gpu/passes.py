"""What the stages that measure have in common: rows in two passes within a time.

Everything but torch.compile, then as many compiled baselines as the time allows. A row is made of
parts, each an item of items.py.
"""

from __future__ import annotations

import argparse
import pathlib
import time

from ..device import facts
from .failures import Failures, not_run
from .items import Done, Item, Run
from .report import Report
from .stages import stage
from .stand_in import STAND_IN

COMPILE_SECONDS = 60  # for one baseline
OFTEN = 1.0  # seconds after which the report is written again


class Passes:
    """In a child: the items, and how they are done.

    A work has a `name` and a `dtype`. Subclasses have report_of, the class of their report;
    works(), row(work), measure(work, row, part), compile(work, row, part) and, for the parent,
    said_of(row).
    """

    report_of: type[Report]
    seconds = 30  # that a part may take
    most_ends = 4  # see items.py
    compiles_failed = True  # whether torch.compile is tried for a row that failed
    compiled_in_small = 1  # works for which torch.compile is tried on the stand-in
    failure = "error"  # in a row: why it was not measured

    def __init__(self, arguments: argparse.Namespace):
        dtype = arguments.dtype
        found = [work for work in self.works() if dtype in (None, work.dtype)]
        self.ranked = {work.name: work for work in sorted(found, key=self.rank)}

    def facts(self) -> dict[str, str]:
        return facts("cuda")

    def rank(self, work) -> int:
        """When it is measured, and torch.compile tried for it: the lowest first."""
        return 0

    def kind(self, work, part: str) -> str:
        return work.name

    def parts(self, work) -> tuple[str, ...]:
        return ("",)

    def compiled_parts(self, work) -> tuple[str, ...]:
        return ("compiled",)

    def items(self) -> list[Item]:
        items = []
        for name, work in self.ranked.items():
            row = self.row(work)
            for part in self.parts(work):
                items.append(self.item(name, part, self.seconds, 2, {"row": row}))
        limit = self.compiled_in_small if STAND_IN else len(self.ranked)
        for name, work in list(self.ranked.items())[:limit]:
            for part in self.compiled_parts(work):
                items.append(self.item(name, part, COMPILE_SECONDS, 10, {"compiles": True}))
        return items

    def item(self, name: str, part: str, seconds: float, least: float, of: dict) -> Item:
        about = {"work": name, "part": part, "compiles": False, **of}
        kind = self.kind(self.ranked[name], part)
        title = f"{name}: {part}" if part else name
        return Item(title, kind, seconds, least, about, optional=about["compiles"])

    def do(self, name: str, given: dict) -> None:
        work, row = self.ranked[given["work"]], given["row"]
        if row is None:
            raise ValueError("nothing of its row was measured")
        if given["compiles"]:
            self.compile(work, row, given["part"])
        else:
            self.measure(work, row, given["part"])


class Measuring:
    """In the parent: the rows, as they come."""

    def __init__(self, run: Run, passes: type[Passes], results: pathlib.Path):
        self.run, self.passes, self.results = run, passes, results
        self.report: Report | None = None
        self.rows: dict[str, dict] = {}
        self.failures, self.written = Failures(), 0.0
        run.given, run.most_ends = self.given, passes.most_ends

    def given(self, item: Item) -> dict:
        """With the row as it is by now; a baseline of a work without one has none."""
        return {**item.about, "row": self.rows.get(item.about["work"], item.about.get("row"))}

    def all(self) -> int:
        """The exit status."""
        try:
            for done in self.run:
                self.take(done)
        finally:
            self.write(over=True)
        if self.report is None:
            print(self.run.broken)
            return 1
        name, folder = self.report.name, self.report.folder.name
        print(f"{folder}/{name}.json and {name}.md: {len(self.rows)} rows")
        print(*self.report.failures, sep="\n")
        print(*self.report.lines(), sep="\n")
        if count := sum(self.run.not_run(optional=True).values()):
            print(f"torch.compile not tried {count} times")
        return int(bool(self.report.failures))

    def take(self, done: Done) -> None:
        about, name = done.item.about, done.item.about["work"]
        if about["compiles"] and name not in self.rows:
            return
        row = self.rows.setdefault(name, about.get("row"))
        if done.result:
            row.update(done.result["row"])
        if about["compiles"]:
            self.compiled(done, row)
        else:
            self.failures.count(done)
            if done.error:
                row[self.passes.failure] = f"{about['part']} {done.error}".strip()
                if not self.passes.compiles_failed:
                    self.run.queue[:] = [i for i in self.run.queue if i.about["work"] != name]
        if done.error:
            print(f"Error: {done.item.name}: {done.error}", flush=True)
        elif about["compiles"] or not self.more_of(name):
            print(f"{name}: {self.passes.said_of(row)}", flush=True)
        if time.monotonic() > self.written + OFTEN:
            self.write()

    def more_of(self, name: str) -> bool:
        """Whether a row has parts to come in pass one."""
        abouts = (item.about for item in self.run.queue)
        return any(about.get("work") == name and not about["compiles"] for about in abouts)

    def compiled(self, done: Done, row: dict) -> None:
        """That torch.compile fails is no failure of ours, unless it ends the process."""
        if done.error:
            row["compile"] = done.error
        elif row["compile"] == "not tried":
            row["compile"] = "compiled"
        if done.ended:
            self.failures.count(done)

    def write(self, over: bool = False) -> None:
        """over: nothing more is to come."""
        if self.report is None and self.run.facts:
            self.report = self.passes.report_of(self.results, self.run.facts)
        if self.report:
            self.report.rows = list(self.rows.values())
            self.report.failures = self.failures.lines() + (not_run(self.run) if over else [])
            self.report.write(complete=over and not self.report.failures)
        self.written = time.monotonic()


def main(module: str, passes: type[Passes], description: str, measuring=Measuring) -> int:
    def parent(run: Run, arguments: argparse.Namespace) -> int:
        return measuring(run, passes, pathlib.Path(arguments.results)).all()

    options = ("--results", "--dtype")
    return stage(module, description, passes, parent, options=options)
