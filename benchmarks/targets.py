"""What the ratios are meant to reach: benchmarks/targets/*.json.

A target names works by patterns (as a shell's of files), and the ratio between two implementations
of each: "over" takes at least "at_least" times as long as "of" (default "ours"; a pattern too, of
which the quickest counts), or "of" takes "at_most" times as long as "over".

cpu.json is for every processor; avx2.json and avx512.json are for those whose kernels are so.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .results import Group, Results


@dataclass(frozen=True)
class Target:
    name: str
    works: tuple[str, ...]
    over: str
    of: str = "ours"
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self):
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"target {self.name!r}: wanted one of at_least and at_most")

    @property
    def wanted(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:g} x the time of {self.over}"
        return f"at least {self.at_least:g} x {self.over}"

    def met_by(self, value: float) -> bool:
        return value <= self.at_most if self.at_most is not None else value >= self.at_least

    def value(self, group: Group) -> float | None:
        names = [name for name in group.rows if fnmatchcase(name, self.of)]
        ratios = [r for name in names if (r := group.ratio(self.over, name)) is not None]
        if not ratios:
            return None
        return 1 / max(ratios) if self.at_most is not None else max(ratios)


@dataclass(frozen=True)
class Verdict:
    """A target on one work; without a value, the pattern `work` has no rows to judge by."""

    target: Target
    work: str
    value: float | None = None

    @property
    def met(self) -> bool:
        return self.value is not None and self.target.met_by(self.value)


def read(path: pathlib.Path) -> list[Target]:
    entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["targets"]
    return [Target(**{**entry, "works": tuple(entry["works"])}) for entry in entries]


def files_for(path: pathlib.Path, results: Results) -> list[pathlib.Path]:
    """path itself; of a folder, the files for the processor that the results are of.

    Raises: ValueError where it has none.
    """
    if not path.is_dir():
        return [path]
    instructions = results.machine.get("instructions")
    files = [path / "cpu.json", path / f"{instructions}.json"]
    if instructions is None or not files[1].exists():
        raise ValueError(f"{path} has no targets for {instructions or 'this device'}")
    return files


def judge(targets: list[Target], results: Results) -> list[Verdict]:
    """One for each work of each pattern, measured or not."""
    return [
        verdict
        for target in targets
        for pattern in target.works
        for verdict in _of_pattern(target, pattern, results)
    ]


def _of_pattern(target: Target, pattern: str, results: Results) -> list[Verdict]:
    groups = [group for name, group in results.groups.items() if fnmatchcase(name, pattern)]
    if not groups:
        return [Verdict(target, pattern)]
    return [Verdict(target, group.name, target.value(group)) for group in groups]


def failures(verdicts: list[Verdict], partial: bool) -> list[Verdict]:
    """Those that are missed; of a partial run, only what it measured."""
    return [v for v in verdicts if not v.met and not (partial and v.value is None)]
