"""Modules' weights as our kernels want them, kept beside the modules between calls, and laid out
anew when a weight changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..ops.backend import NATIVE_DTYPES, missing
from ..ops.memory import memory_available, memory_in_all
from .packed_conv2d import version_of

if "cpu" not in missing:
    from .._C import fingerprint

FREE = 4  # weights are laid out while one part in so many of the machine's memory stays free


class Packed(Protocol):
    """A weight that is laid out when the first inputs come."""

    def drop(self) -> None:
        """Give back what is laid out; the next call does it anew."""


@dataclass(slots=True)
class Kept:
    """What is kept of a module.

    Attributes:
        of: its settings, and what its weight was. numbers: the fingerprint of that weight.
        packed: what was laid out of it.
    """

    of: tuple
    packed: Packed
    numbers: int | None = None


# Beside the modules, whose copies, pickles and state dicts know nothing of it.
_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()


def kept_of(module: nn.Module) -> Kept | None:
    """What is kept of module, whether it holds or not."""
    return _kept.get(module)


def forget(module: nn.Module) -> None:
    """Give back the memory of what is kept of module, where that is something."""
    _kept.pop(module, None)


def forget_if_moved(module: nn.Module, weight: Tensor | None) -> None:
    """`forget` module, if its weight has left the CPU, or the dtypes that are laid out."""
    if _kept and weight is not None and not _is_served(weight):
        forget(module)


def keep(
    module: nn.Module,
    kept: Kept | None,
    weight: Tensor,
    settings: tuple,
    make: Callable[[tuple], Kept | None],
) -> Kept | None:
    """What is kept of module, where its settings and its weight's version and address are as they
    were; else what `make` of them gives, which is kept then.

    An operation in place raises the version. What was written past it, through `.data`, as adapters
    are merged and averages are swapped in, is for `holds_its_numbers` to find.
    """
    of = version_of(weight), weight.data_ptr(), settings
    if kept is None or kept.of != of:
        kept = make(of)
        if kept is not None:
            _kept[module] = kept
    return kept


def can_be_laid_out(weight: Tensor) -> bool:
    """Whether weight is a plain parameter of a dtype that is laid out, on the CPU."""
    return type(weight) is nn.Parameter and _is_served(weight)


def is_plain(module: nn.Module, weight: Tensor) -> bool:
    """Whether module's bias is a parameter [K] of weight's dtype on the CPU, or none, and the
    weight stays.

    A bias that is pruned or parametrized is no parameter of the module. What one of another kind
    means, torch says.
    """
    if "bias" not in module._parameters or _is_lent(module):
        return False
    bias = module._parameters["bias"]
    if bias is None:
        return True
    return bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_cpu


def _is_lent(module: nn.Module) -> bool:
    """Whether accelerate's offloading gives module its weight for one call at a time: to lay it out
    would take the memory that this saves, at each call."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return False
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def _is_served(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in NATIVE_DTYPES


def holds_its_numbers(kept: Kept, weight: Tensor) -> bool:
    """Have what is laid out be of weight's numbers; False where there is no memory for it.

    Args: weight: [K, *], dense, in any order.
    """
    filters = weight.shape[0]
    of_filter = weight.numel() // filters
    numbers = fingerprint(weight.data_ptr(), filters, of_filter, weight.element_size())
    if numbers != kept.numbers:
        # By Winograd's algorithm filters are four times the weight, in float32.
        if memory_available() < memory_in_all() // FREE + 16 * weight.numel():
            return False
        kept.packed.drop()
        kept.numbers = numbers
    return True
