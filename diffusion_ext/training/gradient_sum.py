"""The sum of the gradients over several processes, and the time that it takes."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
