"""The processes of a run: their shares of a batch, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of torch.distributed's default group; one alone where there is no group.

    Attributes: rank: of this one, from 0. count: of all of them.
    """

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        # What the host wants to know goes past the devices' queues.
        self._hosts = dist.new_group(backend="gloo") if self.count > 1 else None
        self._posted: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of so many images in a row; the parts differ by one at most."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """Of all processes, each of which has to ask."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def sum_int(self, value: int) -> int:
        """`sum` of what the host knows."""
        if self.count == 1:
            return value
        total = torch.tensor(value)
        dist.all_reduce(total, group=self._hosts)
        return int(total)

    def agree(self, wish: int) -> int:
        """The largest wish of any process at the call before this one, so that none waits; that of
        this call, where there is one process."""
        if self.count == 1:
            return wish
        mine = torch.tensor(wish)
        before, self._posted = self._posted, (
            mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._hosts, async_op=True),
        )  # fmt: skip
        return self._largest(before)

    def settle(self) -> int:
        """What `agree` has not told yet."""
        before, self._posted = self._posted, None
        return self._largest(before)

    @staticmethod
    def _largest(posted) -> int:
        if posted is None:
            return 0
        wish, work = posted
        work.wait()
        return int(wish)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's contents of contiguous tensors."""
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)

    def wait(self) -> None:
        """For all of them to come this far."""
        if self.count > 1:
            dist.barrier(group=self._hosts)

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first process does what is inside before the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()
