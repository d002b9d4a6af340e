"""What `fuse` says that it did, and of what it left alone why."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

WIDTH = 96


@dataclass(repr=False)
class FuseReport:
    """What `fuse` did, as a line where it is printed; `details` names every layer.

    Attributes:
        fused: (module name, how) of each norm that is fused.
        left: (module name, why) of every other norm, convolution and linear layer, whatever its
            class.
        convolutions: names of the convolutions that ours serve.
        contiguous: how many of those have weights that are not channels_last now, so that ours
            serve them only where their images are.
        filter_bytes: what their filters take beside the weights once they are laid out, on a CPU
            without gradients; those of Winograd's algorithm are float32, whatever the weights are.
        linears: names of the linear layers that ours serve. linear_bytes: as `filter_bytes`.
        attentions: names of the modules whose attention ours serves.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    contiguous: int = 0
    filter_bytes: int = 0
    linears: list[str] = field(default_factory=list)
    linear_bytes: int = 0
    attentions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.fused)} norms fused"]
        if self.convolutions:
            parts.append(
                f"{len(self.convolutions)} convolutions ours "
                f"({_mebibytes(self.filter_bytes)} of filters)"
            )
        if self.contiguous:
            parts.append(f"{self.contiguous} of them not in channels_last")
        if self.linears:
            parts.append(
                f"{len(self.linears)} linear layers ours "
                f"({_mebibytes(self.linear_bytes)} of weights)"
            )
        if self.attentions:
            parts.append(f"{len(self.attentions)} attentions ours")
        parts.append(f"{len(self.left)} layers left; .details() has their names and reasons")
        return ", ".join(parts)

    __repr__ = __str__

    def details(self) -> str:
        """Every norm, convolution and linear layer by its name: which are fused and how, which are
        left and why, and what those of ours want."""
        counts = f"{len(self.fused)} norms fused, {len(self.left)} layers left as they were"
        lines = [counts, *_groups("fused", self.fused), *_groups("left", self.left)]
        if self.convolutions:
            lines += self._of_convolutions()
        if self.linears:
            lines += self._of_linears()
        if self.attentions:
            count = len(self.attentions)
            lines.append(
                f"{count} attentions of ours: on a CPU, without gradients, of enough queries."
            )
        return "\n".join(lines)

    def _of_convolutions(self) -> Iterator[str]:
        mebibytes = _mebibytes(self.filter_bytes)
        count = len(self.convolutions)
        yield f"{count} convolutions of ours: on a CPU, where they gain, a call has enough work and"
        yield "  the weight or the images are channels_last, of Conv3d's 3x3 filters in any format."
        yield f"  To sample, their filters take {mebibytes} more at the most."
        if self.contiguous:
            yield f"  The weights of {self.contiguous} are contiguous now:"
            yield "  model.to(memory_format=torch.channels_last) changes that."

    def _of_linears(self) -> Iterator[str]:
        yield f"{len(self.linears)} linear layers of ours: on a CPU, without gradients, where they"
        yield "  gain and a call has enough work."
        yield f"  Their weights, laid out, take {_mebibytes(self.linear_bytes)} more at the most."


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _groups(what: str, modules: Iterable[tuple[str, str]]) -> Iterator[str]:
    """For each reason a line, and the names of the modules that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in modules:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"  {what:5}  {len(names):3}  {reason}"
        indent = " " * 14
        yield textwrap.fill(
            ", ".join(names),
            WIDTH,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
