"""The report of `evaluate`: an HTML file that holds its pictures, and the same lines as text."""

from __future__ import annotations

import html
from pathlib import Path

from PIL import Image

from .page import embedded, write_page

NOTHING = "–"
# measure, its name in evaluation.json, that of real images in the samples' place, whether it is a
# share, and what it says.
MEASURES = (
    ("recognised", "recognised", "classifier_accuracy", True,
     "taken for the class asked for, by a classifier that has seen real images only"),
    ("Fréchet distance", "frechet", "frechet_real", False, "of the features; less is more alike"),
    ("FID", "inception", "", False, "the same by Inception's features"),
    ("precision", "precision", "precision_real", True, "samples that lie among the real images"),
    ("recall", "recall", "recall_real", True, "real images that lie among the samples"),
    ("distance from the nearest", "nearest_median", "nearest_median_real", False,
     "training image, by pixels, median; far below the real ones' it would be copying"),
    ("copies", "copies", "copies_real", True,
     "nearer to a training image than 99 % of the real images held out"),
    ("loss on images held out", "validation_loss", "", False, "of the average of the weights"),
)  # fmt: skip


def write_report(path: Path, numbers: dict, pictures: dict[str, Image.Image]) -> list[str]:
    """Writes the page. Returns the numbers as lines for a terminal.

    Args: numbers: as in evaluation.json. pictures: by their titles.
    """
    rows = [row for row in _rows(numbers) if row[1] != NOTHING]
    cells = "".join(
        f'<tr><td>{name}</td><td class="n">{ours}</td><td class="n">{real}</td>'
        f"<td><small>{why}</small></td></tr>\n"
        for name, ours, real, why in rows
    )
    how = _how(numbers)
    note = f"Features: {numbers['feature_network']}. They compare runs on the same data alone."
    remarks = numbers["remarks"]
    credit = html.escape(". ".join(["", *remarks, *numbers["data"]]))
    shown = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="{embedded(picture)}">'
        for title, picture in pictures.items()
    )
    body = (
        f"<p>{html.escape(how)}</p>\n"
        f"<table><tr><th>measure</th><th>samples</th><th>real, held out</th><th></th></tr>\n{cells}"
        f"</table>\n<p><small>{note + credit}</small></p>\n{shown}"
    )
    write_page(path, f"Evaluation of {numbers['run']}", body)
    lines = (f"{name:<28}{ours:>9}   real {real:>9}" for name, ours, real, _ in rows)
    return [how, *lines, note, *remarks]


def _how(numbers: dict) -> str:
    """How many samples, and what drew them, as a sentence."""
    sampler = numbers["sampler"]
    parts = [f"{numbers['images']} samples after {numbers['steps']} steps"]
    if "steps" in sampler:
        parts.append(f"by {sampler['sampler']} in {sampler['steps']} steps")
        parts.append(f"guidance {sampler['guidance']:g}")
    parts.append(
        f"from {sampler['samples']}" if "samples" in sampler else f"{sampler['seconds']:g} s"
    )
    return ", ".join(parts) + "."


def _rows(numbers: dict) -> list[tuple[str, str, str, str]]:
    """(measure, of the samples, of real images in their place, what it says)"""
    return [
        (measure, _written(numbers.get(ours), percent), _written(numbers.get(real), percent), why)
        for measure, ours, real, percent, why in MEASURES
    ]


def _written(value: float | None, percent: bool) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"
