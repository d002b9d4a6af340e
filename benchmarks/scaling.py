"""What ContextUnet costs as work grows: time an image, memory, threads; ours beside the source.

    python -m benchmarks.scaling [--quick]

Every point is measured in processes of its own, the source's and ours by turns. Writes scaling.md,
scaling.json and scaling.png to benchmarks/results/<device>/. The exit status is 1 where a run of
ours needs more memory than the source's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from .report import FACTS, RESULTS, slug, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
WHO = ("source", "ours")
TASKS = ("sampling", "training")
TURNS = 2
SLACK = 2 << 20  # bytes by which two processes that do the same differ


@dataclass(frozen=True)
class Point:
    """A run: of DDIM in `steps` steps, or a training step."""

    task: str
    batch: int
    height: int
    threads: int
    device: str
    n_feat: int = 64
    steps: int = 10


@dataclass
class Cost:
    """Of both, by name: seconds of a run, bytes at most."""

    point: Point
    seconds: dict[str, float]
    peak_bytes: dict[str, int]

    @property
    def milliseconds(self) -> dict[str, float]:
        """An image."""
        return {who: 1e3 * seconds / self.point.batch for who, seconds in self.seconds.items()}

    @property
    def within_memory(self) -> bool:
        return self.peak_bytes["ours"] <= self.peak_bytes["source"] + SLACK


def sweeps(device: str, threads: int, quick: bool) -> dict[str, list[Point]]:
    """The points along each axis, for both tasks."""
    if quick:
        point = Point("", 2, 8, threads, device, n_feat=8, steps=2)
        axes = {"batch": [2]}
    else:
        point = Point("", 16, 16, threads, device)
        axes = {"batch": [1, 4, 16, 64], "height": [8, 16, 32]}
    if device == "cpu":
        axes["threads"] = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < threads] + [threads]
    return {
        axis: [replace(point, task=task, **{axis: n}) for task in TASKS for n in values]
        for axis, values in axes.items()
    }


def measure(point: Point, who: str) -> dict:
    """Of a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.scaling_point",
            json.dumps({**asdict(point), "who": who}),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def cost(point: Point, turns: int) -> tuple[Cost, dict]:
    """The best time and the least peak of each, and the facts of the device."""
    found = {who: [] for who in WHO}
    for _, who in itertools.product(range(turns), WHO):
        found[who].append(measure(point, who))
    best = {
        name: {who: min(one[name] for one in found[who]) for who in WHO}
        for name in ("seconds", "peak_bytes")
    }
    return Cost(point, **best), found["ours"][0]["facts"]


# --- what is written ------------------------------------------------------------------------------


def markdown(costs: dict[str, list[Cost]], facts: dict, command: str) -> str:
    said = ", ".join(f"{name} {facts[name]}" for name in FACTS if name in facts)
    parts = [f"`{command}`: {said}. ContextUnet; sampling is DDIM.\n"]
    for axis, line in costs.items():
        heads = ["task", "pictures", "threads", "source, ms an image", "ours", "ratio"]
        heads += ["source, MB", "ours"]
        parts.append(f"By {axis}:\n\n" + table(heads, [cells(c) for c in line]))
    return "\n".join(parts)


def cells(cost: Cost) -> list[str]:
    point, ms = cost.point, cost.milliseconds
    task = f"sampling, {point.steps} steps" if point.task == "sampling" else "training step"
    megabytes = [f"{cost.peak_bytes[who] / 1e6:.0f}" for who in WHO]
    return [
        f"{task}, {point.n_feat} features",
        f"{point.batch}×3×{point.height}×{point.height}",
        str(point.threads),
        *(f"{ms[who]:.3g}" for who in WHO),
        f"{ms['source'] / ms['ours']:.2f}",
        *megabytes,
    ]


def plot(costs: dict[str, list[Cost]], title: str, path: pathlib.Path) -> None:
    """Time an image above memory, an axis of the sweep a column."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(4 * len(costs), 6.5), layout="constrained")
    axes = figure.subplots(2, len(costs), squeeze=False)
    colours = {"source": "#999999", "ours": "#1f5a94"}
    styles = {"sampling": "-o", "training": "--s"}
    for column, (axis, line) in enumerate(costs.items()):
        for task, who in itertools.product(TASKS, WHO):
            of = [c for c in line if c.point.task == task]
            xs = [getattr(c.point, axis) for c in of]
            look = {"color": colours[who], "label": f"{task}, {who}", "markersize": 4}
            axes[0, column].plot(xs, [c.milliseconds[who] for c in of], styles[task], **look)
            axes[1, column].plot(xs, [c.peak_bytes[who] / 1e6 for c in of], styles[task], **look)
        for ax, label in zip(axes[:, column], ("ms an image", "peak memory, MB"), strict=True):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(xs, [str(x) for x in xs])
            ax.set_xlabel({"height": "height and width"}.get(axis, axis))
            ax.set_ylabel(label)
            ax.grid(color="#dddddd", linewidth=0.6)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = os.environ.get("DIFFUSION_EXT_BENCH_DEVICE", "cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one small point, to test this script")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    costs: dict[str, list[Cost]] = {}
    known: dict[Point, Cost] = {}
    facts = {}
    for axis, points in sweeps(options.device, options.threads, options.quick).items():
        for point in points:
            if point not in known:
                known[point], found = cost(point, 1 if options.quick else TURNS)
                facts = facts or found  # of all threads
            costs.setdefault(axis, []).append(known[point])
            print(axis, " | ".join(cells(known[point])), flush=True)
    out = options.out or RESULTS / slug(facts["device"])
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(costs, facts, "python -m benchmarks.scaling")
    (out / "scaling.md").write_text(text, encoding="utf-8")
    rows = [asdict(cost) for cost in known.values()]
    (out / "scaling.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    plot(costs, f"ContextUnet on {facts['device']}", out / "scaling.png")
    above = [c for c in known.values() if not c.within_memory]
    for c in above:
        print("more memory than the source:", " | ".join(cells(c)))
    print(f"{out / 'scaling.md'}, scaling.json, scaling.png: {len(known)} points")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
