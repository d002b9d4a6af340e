"""sampling.json and sampling.md: whole sampling runs."""

from __future__ import annotations

from .report import Report, table, target_table

SOURCE, COMPILED = "source", "source, reduce-overhead"
BEST = "ours, optimized, graph"  # which the targets are about
WAYS = (SOURCE, "ours", "ours, graph", "ours, optimized", BEST)
TARGETS = {SOURCE: 3.0, COMPILED: 1.3}

LEGEND = f"""\
Seconds of whole runs, from noise to images, the least of three. "{SOURCE}" is the loop of
benchmarks/source.py; "{COMPILED}" the same with its network under
torch.compile(mode="reduce-overhead"); "ours" a ContextUnet in `sample`, "optimized" after
optimize_for_sampling, "graph" with engine="graph". Before they were timed, the images after two
steps were compared with those of the source's loop in float32.
"""


class SamplingReport(Report):
    name, title, legend = "sampling", "Sampling", LEGEND

    def summary(self) -> list[dict]:
        return targets(self.rows)

    def sections(self) -> list[str]:
        names = list(dict.fromkeys(name for row in self.rows for name in row["seconds"]))
        heads = ["sampler", "n_feat", "size", "batch", "dtype", *(f"{name}, ms" for name in names)]
        heads += [*(f"× {name}" for name in TARGETS), "failed"]
        rows = [line(row, names) for row in self.rows]
        return ["## Targets\n\n" + target_table(self.summary()), "## Runs\n\n" + table(heads, rows)]


def ratio(row: dict, other: str) -> float | None:
    """How many times as long the other takes as our best."""
    of, ours = row["seconds"].get(other), row["seconds"].get(BEST)
    return of / ours if of and ours else None


def targets(rows: list[dict]) -> list[dict]:
    """One line a target: how many of its rows met it, and the worst."""
    found = []
    for other, least in TARGETS.items():
        values = [value for row in rows if (value := ratio(row, other)) is not None]
        if values:
            met = sum(value >= least for value in values)
            line = {"target": f"{BEST}: × {other}", "wanted": f"≥ {least:g}"}
            found.append({**line, "rows": len(values), "met": met, "worst": min(values)})
    return found


def line(row: dict, names: list[str]) -> list[str]:
    size = f"{row['height']}×{row['height']}"
    start = [row["sampler"], str(row["n_feat"]), size, str(row["batch"]), row["dtype"]]
    seconds = [row["seconds"].get(name) for name in names]
    ratios = [ratio(row, other) for other in TARGETS]
    return [
        *start,
        *("" if s is None else f"{1e3 * s:.1f}" for s in seconds),
        *("" if r is None else f"{r:.2f}" for r in ratios),
        row.get("failed", ""),
    ]
