"""torchrun, which starts the processes of a run, ends them and starts them again.

Some builds of torch have no torch.distributed, as for Windows on ARM: nothing is torchrun's then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .processes import Processes


def started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def told_to_torchrun(function: Callable[[], None]) -> Callable[[], None]:
    """A function whose exception torchrun names as the one that ended the run."""
    if not started_by_torchrun():
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


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
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, count = next(rendezvous("env://"))
    # torchrun's store outlives a failed try, and the addresses of its dead processes lie in it.
    store = dist.PrefixStore(f"try-{_try()}-of-{count}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    yield Processes()
    dist.destroy_process_group()  # not where something failed: it would wait for the others
