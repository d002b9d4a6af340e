"""The result of `bench`: a table for the terminal, and an HTML page with bars."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...ops import choices
from ...version import __version__
from ..page import write_page
from .subject import WAYS, Request
from .turns import Way

ADVICE = "To have diffusion_ext's"
STYLE = """
  .bar { display: grid; grid-template-columns: 8.5em 1fr 6em; gap: .6em; align-items: center;
    margin: .25em 0; }
  .bar i { display: block; height: 1.1em; border-radius: 3px; background: var(--other); }
  .bar.ours i { background: var(--ours); }
"""


@dataclass(frozen=True)
class Result:
    """What was asked for, and what every way took."""

    request: Request
    ways: dict[str, Way]

    @property
    def timed(self) -> dict[str, Way]:
        return {name: way for name, way in self.ways.items() if way.times}

    @property
    def title(self) -> str:
        ready = self.ways["eager"].ready
        pictures = f"{ready.shape[0]} picture{'s' * (ready.shape[0] > 1)}"
        size = "x".join(map(str, ready.shape[1:]))
        return f"{ready.title}: {pictures} of {size}, {self.request.steps} steps"

    @property
    def machine(self) -> str:
        request, device = self.request, torch.device(self.request.device)
        facts = choices.machine(device)
        threads = f", {facts['threads']} threads" if "threads" in facts else ""
        return (
            f"{request.dtype} on {facts.get('processor', device)}{threads}; "
            f"torch {torch.__version__}, diffusion_ext {__version__}"
        )

    def gains(self, name: str) -> str:
        """How many times as long a way takes as ours."""
        if not {name, "ours"} <= self.timed.keys():
            return ""
        ours = self.ways["ours"].seconds_of_a_batch()
        return f"{self.ways[name].seconds_of_a_batch() / ours:.2f}x"

    def fastest(self) -> str:
        """The way that a picture takes least with."""
        return min(self.timed, key=lambda name: self.timed[name].seconds_of_a_batch())

    def verdict(self) -> str:
        if "ours" not in self.timed:
            return f"diffusion_ext could not run it: {self.ways['ours'].failure}"
        gains = [f"{self.gains(n)} as fast as {WAYS[n]}" for n in self.timed if n != "ours"]
        text = f"diffusion_ext is {', '.join(gains)}."
        fastest = self.fastest()
        return text if fastest == "ours" else f"{text} {WAYS[fastest]} is the fastest here."

    def advice(self) -> list[str]:
        """Python that gives diffusion_ext's times, and what to do where another is faster."""
        lines = list(self.ways["eager"].ready.advice)
        if self.fastest() != "ours":
            lines.append(
                f"# {WAYS[self.fastest()]} is faster here; where dx.sample makes the pictures, "
                'engine="auto" takes the fastest.'
            )
        return lines

    def notes(self) -> list[str]:
        ready = self.ways["eager"].ready
        lines = list(ready.notes)
        for name, way in self.ways.items():
            if way.failure:
                lines.append(f"{WAYS[name]}: {way.failure}.")
            elif name != "eager":
                difference = way.difference(self.ways["eager"])
                lines.append(
                    f"{WAYS[name]}: ready in {way.ready.seconds:.1f} s; its results differ from "
                    f"eager's by {difference:.1g} of the largest value at most."
                )
        lines.append("The ways took turns; each time is the best of its rounds.")
        return lines + self._groups()

    def _groups(self) -> list[str]:
        """Which ways took turns with each other, where not all could at once."""
        groups: dict[int, list[str]] = {}
        for name, way in self.timed.items():
            if name != "eager":
                groups.setdefault(way.group, []).append(WAYS[name])
        if len(groups) < 2:
            return []
        told = "; then with ".join(", ".join(names) for _, names in sorted(groups.items()))
        return [f"Memory was short for all at once: eager took turns with {told}."]

    def rows(self) -> list[list[str]]:
        """Part, calls, a time for each way that was timed."""
        timed, ready = self.timed.values(), self.ways["eager"].ready
        rows = [
            [part, str(uses), *(written(way.best(part)) for way in timed)]
            for part, uses in ready.parts
        ]
        batch = [written(way.seconds_of_a_batch() / ready.shape[0]) for way in timed]
        rows.append(["a picture, all calls", "", *batch])
        rows.append(["diffusion_ext's gain", "", *(self.gains(name) for name in self.timed)])
        return rows

    def heads(self) -> list[str]:
        return ["one call", "calls", *(WAYS[name] for name in self.timed)]

    def text(self) -> str:
        """For a terminal."""
        table = [self.heads(), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [_aligned(row, widths) for row in table]
        notes = [f"  {note}" for note in self.notes()]
        advice = [f"    {line}" for line in self.advice()]
        head = [self.title, self.machine, ""]
        return "\n".join([*head, *lines, "", self.verdict(), *notes, "", ADVICE + ":", *advice])

    def record(self) -> dict:
        """The figures as JSON has them: seconds of one call, and of a picture."""
        ready = self.ways["eager"].ready
        seconds = {
            name: {
                **{part: way.best(part) for part, _ in ready.parts},
                "picture": way.seconds_of_a_batch() / ready.shape[0],
            }
            for name, way in self.timed.items()
        }
        return {
            "title": self.title, "machine": self.machine, "request": asdict(self.request),
            "calls": dict(ready.parts), "seconds": seconds, "notes": self.notes(),
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """The HTML page, and the record beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(
            json.dumps(self.record(), indent=1) + "\n", encoding="utf-8"
        )
        heads = "".join(f'<th class="n">{head}</th>' for head in self.heads()[1:])
        rows = "".join(
            f"<tr><td>{row[0]}</td>{''.join(_cells(row[1:]))}</tr>\n" for row in self.rows()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes())
        advice = html.escape("\n".join(self.advice()))
        body = (
            f"<p><strong>{html.escape(self.verdict())}</strong></p>\n"
            f"<p>Seconds of a picture:</p>\n{self._bars()}\n"
            f'<div class="wide"><table><tr><th>{self.heads()[0]}</th>{heads}</tr>\n'
            f"{rows}</table></div>\n"
            f"<h2>{ADVICE}</h2>\n<pre>{advice}</pre>\n<ul>{notes}</ul>\n"
            f"<p><small>{html.escape(self.machine)}</small></p>"
        )
        write_page(path, self.title, body, STYLE)

    def _bars(self) -> str:
        """Of the seconds of a picture."""
        pictures = self.ways["eager"].ready.shape[0]
        seconds = {name: way.seconds_of_a_batch() / pictures for name, way in self.timed.items()}
        longest = max(seconds.values())
        return "\n".join(
            f'<div class="bar {name}"><span>{WAYS[name]}</span>'
            f'<i style="width: {100 * s / longest:.1f}%"></i>'
            f'<span class="n">{written(s)}</span></div>'
            for name, s in seconds.items()
        )


def written(seconds: float) -> str:
    """Such as "3.21 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = row
    cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def _cells(texts: Sequence[str]) -> list[str]:
    return [f'<td class="n">{html.escape(text)}</td>' for text in texts]
