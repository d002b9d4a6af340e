"""The processes of a run, which torchrun started: their shares, and what they agree on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


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


class GradientSum:
    """A network whose gradients are summed over the processes during the backward pass.

    DistributedDataParallel with a sum in place of its mean: each process's gradient is that of its
    share in the mean over all images of a step. Bucket by bucket, while backward goes on.

    Args: output: of the model, for any input; its graph tells whether all parameters are used.
    Attributes: network: called in the model's place.
    """

    def __init__(self, model: nn.Module, device: torch.device, output: Tensor):
        wanted = {parameter for parameter in model.parameters() if parameter.requires_grad}
        self.network = DistributedDataParallel(
            model,
            find_unused_parameters=not wanted <= _leaves(output),
            gradient_as_bucket_view=True,
        )
        self.network.register_comm_hook(device, self._sum)
        self._spans: list[tuple] = []  # (start, end) of each bucket's transfer

    def adding_up(self, last: bool):
        """The context of a forward and backward pass; unless it is the last of a step, the
        gradients stay here."""
        return nullcontext() if last else self.network.no_sync()

    def _sum(self, device, bucket):
        """The hook: a future of the bucket's sum. DDP reads annotations, and wants none as text."""
        start = _now(device)
        sent = dist.all_reduce(bucket.buffer(), async_op=True).get_future()

        def received(future) -> Tensor:
            self._spans.append((start, _now(device)))
            return future.value()[0]

        return sent.then(received)

    def take_seconds(self) -> float:
        """How long gradients have been under way, or waited for, since this was last asked: of the
        transfers that the host knows to have ended."""
        total, before = 0.0, None
        while self._spans and _ended(self._spans[0][1]):
            start, end = self._spans.pop(0)
            seconds = _between(start, end)
            total += seconds if before is None else min(seconds, _between(before, end))
            before = end
        return total


def _leaves(output: Tensor) -> set[Tensor]:
    """What backward would give a gradient to."""
    found, seen, nodes = set(), set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


def _now(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ended(moment) -> bool:
    return isinstance(moment, float) or moment.query()


def _between(start, end) -> float:
    """Seconds."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def started_by_torchrun() -> bool:
    return dist.is_torchelastic_launched()


def told_to_torchrun(function: Callable[[], None]) -> Callable[[], None]:
    """A function whose exception torchrun names as the one that ended the run."""
    return record(function) if started_by_torchrun() else function


def restarted_by_torchrun() -> bool:
    """Whether a process had failed, and this is torchrun's next try."""
    return _try() > 0


def _try() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started, on this machine and others, if it did.

    Args: device: cpu; or cuda, of which each process on a machine takes one.
    """
    if not started_by_torchrun() or dist.is_initialized():
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, count = next(rendezvous("env://"))
    # torchrun's store outlives a failed try, and the addresses of its dead processes lie in it.
    store = dist.PrefixStore(f"try-{_try()}-of-{count}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    yield Processes()
    dist.destroy_process_group()  # not where something failed: it would wait for the others
