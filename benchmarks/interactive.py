"""The documentation's page of plots: the committed results, to choose from and to read off."""

from __future__ import annotations

import plotly.graph_objects as go

from .report import RESULTS, slug
from .results import Group, Results, load

HEAD = """# Every row, interactive

How many times as fast as plain eager torch, on a logarithmic axis. Choose the work above each plot.
Point at a bar for its milliseconds; click a name to hide it. [Benchmarks](benchmarks.md) says how
it was measured, what bounds it, and what a warm heap changes.

"""
# A narrow page scrolls it.
WIDE = '<div style="overflow-x: auto"><div style="min-width: 42em">{}</div></div>'
PLOTLY = "assets/plotly.min.js"
INKS = {
    "eager": "#9aa5b1", "reference": "#c9d1db", "compiled": "#e07b00",
    "compiled, frozen": "#a03c00", "OpenVINO": "#b0005c", "ONNX Runtime": "#8a2be2",
    "ours": "#2a6fdb", "ours, optimized": "#17458f",
    "ours, fused": "#17458f", "ours, traced": "#0f8b8d", "diffusers": "#2b8a3e",
}  # fmt: skip
OTHERS = "#c0a000"
HIDDEN = ("copy", "warm heap")  # rows that the page leaves to results.md
BAR, TOP, BOTTOM, TICKS = 11, 170, 40, 30  # pixels: of a bar; around them all; of the numbers


def page() -> str:
    """Markdown, a plot for each device."""
    parts = [HEAD]
    for file in sorted(RESULTS.glob("*/results.json")):
        results = load([file])
        machine = results.machine
        about = f"torch {machine['torch']}, {machine['date']}"
        plot = figure(results).to_html(
            full_html=False, include_plotlyjs=False, div_id=f"plot-{slug(machine['device'])}",
            config={"displayModeBar": False},
        )  # fmt: skip
        parts.append(f"## {machine['device']}\n\n{about}\n\n{WIDE.format(plot)}\n\n")
    return parts[0] + f'<script src="{PLOTLY}"></script>\n\n' + "".join(parts[1:])


def figure(results: Results) -> go.Figure:
    """A trace for each op and implementation; a menu shows those of one op."""
    ops = dict.fromkeys(group.info["op"] for group in results.groups.values())
    shown, plot = [], go.Figure()
    for op in ops:
        groups = [g for g in results.groups.values() if g.info["op"] == op]
        for name in _names(groups):
            plot.add_trace(_bars(groups, name))
            shown.append(op)
    buttons = [
        {"label": op, "method": "update", "args": [
            {"visible": [of == op for of in shown]}, _places(results, op)]}
        for op in ops
    ]  # fmt: skip
    first = next(iter(ops))
    for trace, op in zip(plot.data, shown, strict=True):
        trace.visible = op == first
    plot.update_layout(
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
                      "pad": {"b": 110}}],
        barmode="group", margin={"l": 10, "r": 10, "t": TOP, "b": BOTTOM},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": "#808080"},
        legend={"orientation": "h", "yanchor": "bottom", "x": 0}, bargap=0.3,
    )  # fmt: skip
    for place, value in _places(results, first).items():
        plot.layout[place] = value
    grey = "rgba(128,128,128,0.25)"
    plot.update_xaxes(type="log", side="top", gridcolor=grey)
    plot.update_yaxes(autorange="reversed", automargin=True)
    return plot


def _names(groups: list[Group]) -> list[str]:
    """Of the implementations that are shown."""
    names = dict.fromkeys(name for group in groups for name in group.rows)
    return [name for name in names if not any(word in name for word in HIDDEN)]


def _bars(groups: list[Group], name: str) -> go.Bar:
    measured = [g for g in groups if name in g.rows and g.ratio(g.info["baseline"], name)]
    return go.Bar(
        name=name,
        y=[_label(group) for group in measured],
        x=[group.ratio(group.info["baseline"], name) for group in measured],
        customdata=[1e3 * group.rows[name].seconds for group in measured],
        hovertemplate="%{y}<br>%{customdata:.3g} ms, %{x:.2f}x",
        orientation="h",
        marker_color=INKS.get(name, OTHERS),
    )


def _label(group: Group) -> str:
    info = group.info
    size = "×".join(map(str, info["shape"]))
    layout = "" if info["layout"] == "contiguous" else f", {info['layout']}"
    dtype = "" if info["dtype"] == "float32" else f", {info['dtype']}"
    return f"{info['variant']}, {size}{dtype}{layout}"


def _places(results: Results, op: str) -> dict[str, float]:
    """The plot's height, and its legend above the numbers."""
    groups = [group for group in results.groups.values() if group.info["op"] == op]
    bars = BAR * (len(_names(groups)) + 2) * len(groups)
    return {"height": TOP + bars + BOTTOM, "legend.y": 1 + TICKS / bars}
