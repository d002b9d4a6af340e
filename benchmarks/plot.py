"""The ratios of a run as bars: how many times as fast as eager torch, on a logarithmic axis."""

from __future__ import annotations

import pathlib

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .results import Group, Results

OURS = {"contiguous": "#1f5a94", "channels_last": "#7fb2de"}
# Implementation -> marker and colour; the others are in the table only.
MARKS = {
    "compiled": ("D", "#e07b00"),
    "compiled, frozen": ("s", "#a03c00"),
    "OpenVINO": ("<", "#0071c5"),
    "ONNX Runtime": (">", "#555555"),
    "diffusers": ("^", "#2b8a3e"),
    "liger-kernel": ("v", "#8a2be2"),
    "apex": ("P", "#b0005c"),
}
WARM = ", warm heap"
WARM_MARK = {"marker": "|", "color": "black", "linestyle": "", "markersize": 6}
ROW = 0.23  # inches
LEAST = 1 / 16  # the left end; what is slower still is in the table
LABEL = {"va": "center", "fontsize": 6.5}


def plot(results: Results, path: pathlib.Path) -> None:
    with mpl.rc_context({"font.size": 8}):
        figure_of(results).savefig(path, dpi=110)


def figure_of(results: Results) -> Figure:
    """GroupNorm in the right column where there is anything beside it, the rest in the left one."""
    panels = panels_of(results)
    right = [panel for panel in panels if panel[0].startswith("group_norm_act")]
    columns = [c for c in ([p for p in panels if p not in right], right) if c]
    rows = max(sum(len(works) + 2.2 for _, works in column) for column in columns)
    figure = Figure(figsize=(7.5 * len(columns), ROW * rows + 1.4), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        heights = [len(works) + 0.8 for _, works in column]
        axes = part.subplots(len(column), 1, sharex=True, squeeze=False, height_ratios=heights)
        for ax, (title, works) in zip(axes[:, 0], column, strict=True):
            draw(ax, title, works)
        last = axes[-1, 0]
        last.set_xlabel("times as fast (log scale)")
        last.set_xlim(max(last.get_xlim()[0], LEAST))  # of all: drawing more would not widen it
    add_legend(figure, results)
    figure.suptitle(f"Times as fast as plain eager torch: {results.machine['device']}")
    return figure


def panels_of(results: Results) -> list[tuple[str, dict[str, list[Group]]]]:
    """[(title, {label: the groups of a line, one a layout})]"""
    panels: dict[str, dict[str, list[Group]]] = {}
    for group in results.groups.values():
        if group.ratio(group.info["baseline"]) is None:
            continue
        info = group.info
        norm = info["op"] == "group_norm_act"
        variant, _, groups = info["variant"].partition(", ") if norm else (info["variant"], "", "")
        sizes = "×".join(map(str, info["shape"]))
        label = f"{sizes}, {groups}" if norm else f"{variant}, {sizes}"
        if info["dtype"] != "float32":
            label += f", {info['dtype']}"
        title = f"{info['op']}, {variant}" if norm else info["op"]
        panels.setdefault(title, {}).setdefault(label, []).append(group)
    return list(panels.items())


def draw(ax, title: str, works: dict[str, list[Group]]) -> None:
    for y, groups in enumerate(works.values()):
        height = 0.8 / len(groups)
        for i, group in enumerate(groups):
            at = y + (i - (len(groups) - 1) / 2) * height
            draw_work(ax, group, at, height)
    ax.set_yticks(range(len(works)), list(works))
    ax.set_ylim(len(works) - 0.4, -0.6)
    ax.set_xscale("log", base=2)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.tick_params(axis="x", labelbottom=True)
    ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def draw_work(ax, group: Group, y: float, height: float) -> None:
    baseline = group.info["baseline"]
    ours = [n for n in group.rows if n.startswith("ours") and not n.endswith(WARM)]
    best = max(group.ratio(baseline, name) for name in ours)
    left, right = min(1, best), max(1, best)
    ax.barh(y, right - left, height, left=left, color=OURS[group.info["layout"]])
    marked = {name: r for name in MARKS if (r := group.ratio(baseline, name)) and name != baseline}
    for name, ratio in marked.items():
        marker, colour = MARKS[name]
        ax.plot(ratio, y, marker, color=colour, markersize=3.5, zorder=3)
    if warm := group.ratio(baseline + WARM, "ours" + WARM):
        ax.plot(warm, y, zorder=3, **WARM_MARK)
    beside = max(right, *marked.values(), warm or 0)
    ax.annotate(f"{best:.1f}", (beside, y), (4, 0), textcoords="offset points", **LABEL)


def add_legend(figure: Figure, results: Results) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = results.groups.values()
    layouts = dict.fromkeys(group.info["layout"] for group in groups)
    handles = [
        Patch(color=OURS[layout], label=f"ours, {layout} (the quickest of ours)")
        for layout in layouts
    ]
    present = {name for group in groups for name in group.rows if name != group.info["baseline"]}
    for name, (marker, colour) in MARKS.items():
        if name in present:
            label = {"compiled": "torch.compile", "compiled, frozen": "torch.compile, frozen"}
            handles.append(
                Line2D(
                    [], [], marker=marker, color=colour, linestyle="", label=label.get(name, name)
                )
            )
    if any("ours" + WARM in group.rows for group in groups):
        handles.append(Line2D([], [], label="ours, both in a warm heap", **WARM_MARK))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
