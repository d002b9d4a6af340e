"""The figures of one or more runs, from the JSON of pytest-benchmark."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One implementation of a work. seconds, median: of a call; seconds is the best round's."""

    seconds: float
    median: float
    info: dict


@dataclass
class Group:
    """A work, by the names of its implementations."""

    name: str
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def info(self) -> dict:
        """What is the same of every row: op, variant, shape, dtype, layout, baseline."""
        return next(iter(self.rows.values())).info

    def ratio(self, over: str, name: str = "ours", by: str = "seconds") -> float | None:
        """How many times as long `over` takes as `name`, where both were measured."""
        slow, quick = self.rows.get(over), self.rows.get(name)
        return getattr(slow, by) / getattr(quick, by) if slow and quick else None


@dataclass
class Results:
    """machine: its facts. left_out: the rows of the suite that no run was asked for."""

    machine: dict
    left_out: list[str]
    groups: dict[str, Group]


def load(paths: Iterable[pathlib.Path]) -> Results:
    """Of several runs on one machine, the best time of each row.

    Raises: ValueError for runs on different devices.
    """
    files = [json.loads(pathlib.Path(path).read_text(encoding="utf-8")) for path in paths]
    devices = {file["machine_info"]["device"] for file in files}
    if len(devices) != 1:
        raise ValueError(f"wanted runs on one device, got {sorted(devices)}")
    groups: dict[str, Group] = {}
    for file in files:
        for benchmark in file["benchmarks"]:
            group = groups.setdefault(benchmark["group"], Group(benchmark["group"]))
            info, stats = benchmark["extra_info"], benchmark["stats"]
            before, name = group.rows.get(info["implementation"]), info["implementation"]
            if before is None or stats["min"] < before.seconds:
                group.rows[name] = Row(stats["min"], stats["median"], info)
    left_out = set.intersection(*(set(file["left_out"]) for file in files))
    return Results(files[-1]["machine_info"], sorted(left_out), groups)
