"""What failed, in a few lines: equal failures of a kind are one."""

from __future__ import annotations

import collections
import re

from .items import Done, Run, said_of
from .running import FAILED

MOST = 40


class Failures:
    def __init__(self):
        self.totals = collections.Counter()  # of the items that were done, by kind
        self.found: dict[tuple[str, str], list[Done]] = {}

    def count(self, done: Done) -> None:
        self.totals[done.item.kind] += 1
        if done.error:
            alike = re.sub(r"\d[\w.+-]*", "#", done.error)
            self.found.setdefault((done.item.kind, alike), []).append(done)

    def lines(self) -> list[str]:
        """Those that ended a child first, then the most frequent."""

        def rank(pair):
            return -any(done.ended for done in pair[1]), -len(pair[1])

        lines = []
        for (kind, _), alike in sorted(self.found.items(), key=rank):
            worst = max(alike, key=lambda done: done.ended)
            which = "" if worst.item.name == kind else f" ({worst.item.name})"
            number = f"{len(alike)} of {self.totals[kind]}"
            lines.append(f"{FAILED}{kind}: {number}: {worst.error}{which}")
        if len(lines) > MOST:
            lines[MOST:] = [f"... {len(lines) - MOST} more"]
        return lines


def not_run(run: Run) -> list[str]:
    """Why items of a run that is over were not run, and how many of which kinds."""
    kinds = run.not_run()
    lines = [f"{FAILED}{run.broken}"] if run.broken else []
    if kinds:
        lines.append(f"{FAILED}{sum(kinds.values())} of {run.total} items were not run")
        lines += [f"{FAILED}not run: {line}" for line in said_of(kinds)]
    return lines
