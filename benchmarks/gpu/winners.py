"""tune.json and tune.md: which values of csrc/cuda/tuning.h's constants won, and the header."""

from __future__ import annotations

import math
import re

from .report import Report, table
from .variants import NORM, VARIANTS, header_with

AS_IT_IS = "as_it_is"
GAIN = 0.98  # of the time: less is taken for noise
EXTREMES = {"on_chip_where_it_fits", "split_always"}  # they show where a plan is wrong

LEGEND = """\
µs: the kernels of a call in bfloat16, replayed from a CUDA graph over sets of arguments that are
larger together than the second-level cache; medians of 7, the variants in turn. A backward's time
is that of forward and backward without the forward's. A constant's ratio is the geometric mean over
the works that it is about; under 0.98 it wins.
"""


class TuneReport(Report):
    name, title, legend = "tune", "Variants of the kernels", LEGEND

    def findings(self) -> dict:
        return {"winners": self.winners()}

    def winners(self) -> dict[str, dict]:
        """constant -> the best of its variants: value and the ratio of its time to today's."""
        rows, found = apart(self.rows), {}
        for op in {row["op"] for row in rows}:
            for variant in VARIANTS:
                if variant.op != op or variant.name in EXTREMES:
                    continue
                for constant, value in variant.changes:
                    ratio = mean_ratio(rows, op, constant, variant.name)
                    if ratio and ratio < found.get(constant, {"ratio": GAIN})["ratio"]:
                        found[constant] = {"value": value, "ratio": ratio, "variant": variant.name}
        return found

    def header(self) -> str:
        """tuning.h as this device would have it."""
        facts = [f"{name} {self.facts[name]}" for name in ("torch", "CUDA", "driver")]
        measured = f"{self.facts['device']} ({', '.join(facts)}), {self.facts['date']}."
        changes = {constant: found["value"] for constant, found in self.winners().items()}
        text = header_with(changes)
        return re.sub(r"// Measured on: .*\n(?:// .*\n)*", f"// Measured on: {measured}\n", text)

    def lines(self) -> list[str]:
        won = sorted(self.winners().items(), key=lambda item: item[1]["ratio"])
        lines = [
            f"{constant} = {w['value']} takes {w['ratio']:.2f} of today's time ({w['variant']})"
            for constant, w in won
        ]
        if self.rows and not won:
            lines.append("no constant won 2 %: tuning.h stays as it is")
        return lines + self.wrong_plans()

    def wrong_plans(self) -> list[str]:
        """Where another plan than the one chosen is faster."""
        lines = []
        for row in apart(self.rows):
            for name in sorted(EXTREMES & set(row["us"])):
                ratio = row["us"][name] / row["us"].get(AS_IT_IS, math.inf)
                if 0 < ratio < GAIN:
                    chosen = f"{title(row)} was chosen"
                    lines.append(f"{chosen}, but {name} takes {ratio:.2f} of its time")
        return lines

    def sections(self) -> list[str]:
        names = list(dict.fromkeys(name for row in self.rows for name in row["us"]))
        heads = ["work", *names]
        rows = [
            [title(r), *(f"{r['us'][n]:.2f}" if n in r["us"] else "" for n in names)]
            for r in self.rows
        ]
        lines = "".join(f"* {line}\n" for line in self.failures + self.lines())
        return [
            f"## Found\n\n{lines}",
            "## csrc/cuda/tuning.h\n\n```cpp\n" + self.header() + "```\n",
            "## µs\n\n" + table(heads, rows),
        ]


def title(row: dict) -> str:
    size = "×".join(map(str, row["shape"]))
    return ", ".join(
        filter(None, [row["work"], row["variant"], size, row["layout"], row.get("plan")])
    )


def apart(rows: list[dict]) -> list[dict]:
    """The rows, with the forward's times taken out of those of forward and backward."""
    forward = {
        (tuple(row["shape"]), row["layout"]): row["us"]
        for row in rows
        if row["op"] == NORM and not row["backward"]
    }
    found = []
    for row in rows:
        if row["backward"] and row["op"] == NORM:
            taken = forward.get((tuple(row["shape"]), row["layout"]), {})
            us = {name: t - taken[name] for name, t in row["us"].items() if name in taken}
            row = {**row, "us": {name: t for name, t in us.items() if t > 0}}
        found.append(row)
    return found


def concerns(constant: str, row: dict) -> bool:
    """Whether a work's time depends on a constant."""
    last = row["layout"] == "channels_last"
    if constant.startswith(("kForward", "kBackward")):
        kernel = "kBackward" if row["backward"] else "kForward"
        if row["plan"] == "split":
            kernel += "Split"
        elif last:
            kernel += "Last"
        return constant == kernel
    if constant == "kPartsPerMultiprocessor":
        return row["plan"] == "split"
    if constant == "kLeastLanes":
        return not last
    made = row["op"] != NORM and "given" not in row["variant"] and "DDIM" not in row["variant"]
    if constant == "kPixelThreads":
        return last and made
    if constant == "kElementThreads":
        return not (last and made)
    return True


def mean_ratio(rows: list[dict], op: str, constant: str, variant: str) -> float | None:
    """The geometric mean of a variant's times, in today's."""
    logs = [
        math.log(row["us"][variant] / row["us"][AS_IT_IS])
        for row in rows
        if row["op"] == op and concerns(constant, row) and {variant, AS_IT_IS} <= set(row["us"])
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None
