"""Where a row of a sampler's table has its numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_SLOTS", "MOST_WRITES", "RowShape"]

MOST_SLOTS, MOST_WRITES = 6, 2  # of csrc/math/sampler_step.h


@dataclass(frozen=True)
class RowShape:
    """The columns of a row: kx km | ax am a0 a1..aS az | slot bx bm b0 b1..bS bz | ... | guidance.

    Attributes:
        slots: S, how many tensors the table remembers things in; 1 for a table that has none, whose
            a1 is 0.
        writes: how many of them a row writes, each with a slot's number, from 0 (below 0: none),
            and a combination. With one slot and no writes, the slot receives every row's x0.
        guided: whether each row has a guidance scale of its own.
    """

    slots: int = 1
    writes: int = 0
    guided: bool = False

    @property
    def combination(self) -> int:
        """The weights of x, m, x0, the slots and z."""
        return 4 + self.slots

    @property
    def width(self) -> int:
        return 2 + self.combination + self.writes * (1 + self.combination) + self.guided

    @property
    def keeps_x0(self) -> bool:
        """Whether the one slot receives every row's x0, without columns that say so."""
        return self.slots == 1 and self.writes == 0

    @property
    def next(self) -> slice:
        """The combination that is the next sample."""
        return slice(2, 2 + self.combination)

    def slot(self, write: int) -> int:
        """The column that says where a write goes."""
        return 2 + self.combination + write * (1 + self.combination)

    def write(self, write: int) -> slice:
        """The combination that a write puts there."""
        return slice(self.slot(write) + 1, self.slot(write) + 1 + self.combination)

    @classmethod
    def of(cls, columns: int, slots: int) -> RowShape | None:
        """The shape of a row of so many columns for so many slots; None where there is none."""
        columns = int(columns)  # a tensor, while torch.jit traces
        writes, guided = divmod(columns - cls(slots).width, 5 + slots)
        fits = 1 <= slots <= MOST_SLOTS and 0 <= writes <= MOST_WRITES and guided <= 1
        return cls(slots, writes, bool(guided)) if fits else None
