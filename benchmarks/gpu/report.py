"""What is written of one device, again after each row, so that an end loses none."""

from __future__ import annotations

import json
import os
import pathlib
import re

from . import targets

LEGEND = """\
A **pass** is one tensor of x's size, read or written; a **copy** (`y.copy_(x)`, two passes) of the
same tensor was measured in the same run.

* µs: the kernels of a call, replayed from a CUDA graph over sets of arguments that are larger
  together than the second-level cache. call µs: one of many calls back to back from Python,
  launches included. Medians of 7.
* GB/s: of the passes that the fused op needs. % of copy: that, of the copy's. copies: the time, in
  copies.
* × eager, × compile: how many times as long the eager formula takes, and what torch.compile makes
  of it.

Each result was compared with the float64 reference before it was timed.
"""


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class Report:
    """The rows of one device, in folder/<device>/<name>.json and <name>.md.

    Subclasses: name, title, legend; summary(), the targets; and sections() of the Markdown.
    """

    name: str
    title: str
    legend: str

    def __init__(self, folder: pathlib.Path, facts: dict[str, str]):
        self.folder = folder / slug(facts["device"])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts, self.rows, self.failures = facts, [], []  # failures: lines

    def write(self, complete: bool = False) -> None:
        """Rows are not lost to an error in what is made of them."""
        made, text = {}, ""
        try:
            made = {**self.findings(), "summary": self.lines()}
            text = self.text(complete)
        except Exception as error:
            self.failures.append(f"FAILED the report: {type(error).__name__}: {error}")
            complete = False
        data = {**self.facts, "complete": complete, "rows": self.rows, **made}
        data["failures"] = self.failures
        self._replace(f"{self.name}.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        self._replace(f"{self.name}.md", text)

    def text(self, complete: bool) -> str:
        facts = "\n".join(f"* {name}: {value}" for name, value in self.facts.items())
        parts = [f"# {self.title} on {self.facts['device']}\n\n{facts}\n\n{self.legend}"]
        if not complete:
            parts.append("**Incomplete**: the run ended before every row was measured.\n")
        return "\n".join(parts + self.sections())

    def findings(self) -> dict:
        """What is made of the rows, for the JSON file."""
        return {"targets": self.summary()}

    def lines(self) -> list[str]:
        """The targets that are missed, the furthest first, and how many are met."""
        found = self.summary()
        missed = [t for t in found if t["met"] < t["rows"]]
        lines = [
            f"missed in {t['rows'] - t['met']} of {t['rows']}: {t['target']} {t['wanted']}, "
            f"worst {t['worst']:.2f}"
            for t in sorted(missed, key=shortfall, reverse=True)
        ]
        return [*lines, f"{len(found) - len(missed)} of {len(found)} targets met"] if found else []

    def _replace(self, name: str, text: str) -> None:
        partial = self.folder / f".{name}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.folder / name)


def shortfall(target: dict) -> float:
    """By which factor the worst of a target's rows misses it."""
    sign, limit = target["wanted"].split()
    return float(limit) / target["worst"] if sign == "≥" else target["worst"] / float(limit)


class OpsReport(Report):
    name, title, legend = "ops", "The ops", LEGEND

    def summary(self) -> list[dict]:
        for row in self.rows:
            if "error" not in row:
                row["targets"] = targets.of_row(row)
        return targets.summary(self.rows)

    def sections(self) -> list[str]:
        parts = ["## Targets\n\n" + target_table(self.summary())]
        parts.append("## Passes\n\n" + passes_table(self.rows))
        for title in dict.fromkeys(title_of(row) for row in self.rows):
            rows = [row for row in self.rows if title_of(row) == title]
            parts.append(f"## {title}\n\n" + row_table(rows))
        return parts


def title_of(row: dict) -> str:
    if row["op"] == "group_norm_act":
        return f"group_norm_act, {row['variant']}"
    return f"{row['op']}, {row['scale']}"


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def target_table(found: list[dict]) -> str:
    return table(
        ["target", "wanted", "rows", "met", "worst"],
        [
            [t["target"], t["wanted"], str(t["rows"]), str(t["met"]), f"{t['worst']:.2f}"]
            for t in found
        ],
    )


def passes_table(rows: list[dict]) -> str:
    known = {
        (row["op"], row["variant"]): [str(row["passes"]), str(row["eager_passes"] or "")]
        for row in rows
    }
    return table(
        ["op", "variant", "fused", "eager"], [[*key, *value] for key, value in known.items()]
    )


def row_table(rows: list[dict]) -> str:
    norm = rows[0]["op"] == "group_norm_act"
    heads = ["shape" if norm else "work", "dtype", "layout", *(["plan"] if norm else [])]
    heads += ["µs", "GB/s", "% of copy", "copies", "× eager", "× compile"]
    heads += ["call µs", "call × eager", "call × compile", "target", "met"]
    return table(heads, [line(row, norm) for row in rows])


def line(row: dict, norm: bool) -> list[str]:
    sizes = "×".join(str(n) for n in row["shape"])
    start = [sizes if norm else f"{row['variant']}, {sizes}", row["dtype"], row["layout"]]
    if norm:
        start.append("<br>".join(plan_text(name, p) for name, p in row["plan"].items()))
    if "error" in row:
        return [*start, row["error"], *[""] * 10]

    def times(other, which):
        value = targets.ratio(row, other, which)
        if value is None:
            return row["compile"] if other == "compiled" else ""
        return f"{value:.2f}"

    micro = row["device_us"]["fused"]
    found = row["targets"]
    return [
        *start,
        f"{micro:.2f}" + (f" ({row['note']})" if row["note"] else ""),
        f"{row['bytes'] / micro / 1e3:.0f}",
        f"{targets.copy_percent(row):.0f}",
        f"{targets.copies(row):.2f}",
        *(times(other, "device_us") for other in ("eager", "compiled")),
        f"{row['call_us']['fused']:.2f}",
        *(times(other, "call_us") for other in ("eager", "compiled")),
        "<br>".join(f"{t['target'].split(': ')[-1]} {t['wanted']}" for t in found),
        "<br>".join("yes" if t["met"] else "no" for t in found),
    ]


def plan_text(name: str, plan: dict) -> str:
    width = f"{plan['vector']} wide" if plan["vector"] > 1 else "scalar"
    return f"{name}: {plan['kind']}, {plan['parts']} × {plan['threads']} threads, {width}"
