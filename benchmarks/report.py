"""A run of the suite as a table of ratios, a plot, and a verdict on the targets.

    python -m benchmarks.report RUN.json [RUN.json ...] [--fail-below benchmarks/targets]

RUN.json is what `pytest benchmarks --benchmark-json=RUN.json` wrote; of several runs on one machine
the best time of each row counts. Writes results.md, results.json and plot.png to
benchmarks/results/<device>/. With --fail-below the exit status is 1 where a ratio falls short of
its target, or was not measured by a run of the whole suite. Of a folder, the files of targets count
that are for the processor: cpu.json, and avx2.json or avx512.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

from .results import Group, Results, load
from .targets import Verdict, failures, files_for, judge, read

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

LEGEND = """\
"NAME, x eager" is how many times as fast as plain eager torch NAME is (for the pipeline, as
diffusers), by the best round of each in the same run; "by medians" by the median round. GB/s counts
the bytes that have to be moved at least; % of copy is of the bandwidth of `y.copy_(x)` on the same
tensor. Each result was compared with the float64 reference before it was timed; error is the
largest difference. docs/benchmarks.md says more.
"""
FACTS = (
    "device", "instructions", "python", "torch", "CUDA", "driver", "diffusion_ext", "diffusers",
    "openvino", "onnxruntime", "date",
)  # fmt: skip


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# --- the works ------------------------------------------------------------------------------------


def markdown(results: Results, verdicts: list[Verdict], files: str = "") -> str:
    """files: that the verdicts are about."""
    facts = "\n".join(f"* {n}: {results.machine[n]}" for n in FACTS if n in results.machine)
    parts = [f"# Benchmarks on {results.machine['device']}\n\n{facts}\n\n{LEGEND}"]
    if results.left_out:
        parts.append(f"**Partial**: {len(results.left_out)} rows of the suite were left out.\n")
    if verdicts:
        parts.append(f"## Targets of {files}\n\n" + target_table(verdicts))
    for op in dict.fromkeys(group.info["op"] for group in results.groups.values()):
        groups = [group for group in results.groups.values() if group.info["op"] == op]
        parts.append(f"## {op}\n\n" + work_table(groups))
    return "\n".join(parts)


def work_table(groups: list[Group]) -> str:
    baseline = groups[0].info["baseline"]
    every = dict.fromkeys(name for group in groups for name in group.rows)
    others = [name for name in every if name not in ("copy", baseline, "ours")]
    named = [*others, "ours"]
    heads = ["work", f"{baseline}, ms", "ours, ms", *(f"{name}, x {baseline}" for name in named)]
    heads += ["by medians", "ours, GB/s", "% of copy", "error"]
    return table(heads, [work_line(group, baseline, named) for group in groups])


def work_line(group: Group, baseline: str, named: list[str]) -> list[str]:
    info, ours = group.info, group.rows.get("ours")
    sizes = "×".join(map(str, info["shape"]))
    work = f"{info['variant']}, {sizes}, {info['dtype']}, {info['layout']}"
    percent = ours and ours.info.get("percent_of_copy")
    return [
        work,
        *(milliseconds(group, name) for name in (baseline, "ours")),
        *(number(group.ratio(baseline, name), ".2f") for name in named),
        number(group.ratio(baseline, by="median"), ".2f"),
        number(ours and ours.info["gb_per_s"], ".1f"),
        number(percent, ".0f"),
        number(ours and ours.info["max_error"], ".0e"),
    ]


def milliseconds(group: Group, name: str) -> str:
    row = group.rows.get(name)
    return number(row and 1e3 * row.seconds, ".3g")


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# --- the targets ----------------------------------------------------------------------------------


def target_table(verdicts: list[Verdict]) -> str:
    lines = []
    for v in verdicts:
        value = "not measured" if v.value is None else f"{v.value:.2f}"
        lines.append([v.target.name, v.work, v.target.wanted, value, "yes" if v.met else "**no**"])
    return table(["target", "work", "wanted", "measured", "met"], lines)


def said_of(verdicts: list[Verdict], failed: list[Verdict]) -> str:
    lines = []
    for v in verdicts:
        value = "not measured" if v.value is None else f"{v.value:.2f}"
        state = "met" if v.met else "MISSED" if v in failed else "left out"
        lines.append(f"{state:<9}{value:>13}  {v.target.wanted:<32}  {v.work}")
    met = sum(v.met for v in verdicts)
    return "\n".join([*lines, f"{met} of {len(verdicts)} met, {len(failed)} missed"])


# --- the files ------------------------------------------------------------------------------------


def thin(results: Results) -> str:
    """The figures behind the table, a row a line, in the form that `load` reads."""
    rows = [
        {
            "group": group.name,
            "stats": {"min": float(f"{row.seconds:.4g}"), "median": float(f"{row.median:.4g}")},
            "extra_info": row.info,
        }
        for group in results.groups.values()
        for row in group.rows.values()
    ]
    machine = {name: results.machine[name] for name in FACTS if name in results.machine}
    head = json.dumps({"machine_info": machine, "left_out": results.left_out})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{head[:-1]}, "benchmarks": [\n{lines}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN.json")
    parser.add_argument("--fail-below", type=pathlib.Path, metavar="TARGETS")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    results = load(options.runs)
    files = files_for(options.fail_below, results) if options.fail_below else []
    verdicts = judge([target for file in files for target in read(file)], results)
    out = options.out or RESULTS / slug(results.machine["device"])
    out.mkdir(parents=True, exist_ok=True)
    names = " and ".join(file.name for file in files)
    (out / "results.md").write_text(markdown(results, verdicts, names), encoding="utf-8")
    (out / "results.json").write_text(thin(results), encoding="utf-8")
    from .plot import plot  # matplotlib is slow to import

    plot(results, out / "plot.png")
    failed = failures(verdicts, partial=bool(results.left_out))
    if verdicts:
        print(f"{said_of(verdicts, failed)}, of {names}")
    print(f"{out / 'results.md'}, results.json, plot.png: {len(results.groups)} works")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
