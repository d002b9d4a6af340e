"""Argument checks: an error names the argument, what came and what is wanted."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Device: TypeAlias = torch.device | str | int
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (str, bytes, int, float, complex, np.generic, tuple, list, dict, set, type(None))
LONGEST = 80  # characters of a value that a message shows


def kind(value) -> str:
    """What a value is, for a message: its type's name. A class is told from an object of it."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def shown(value) -> str:
    """A value for a message, as Python writes it. A tensor has its dtype and shape, and what is
    long, or no plain value, such as a network, is told by its kind."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    text = repr(value) if isinstance(value, PLAIN) else ""
    return text if text and len(text) <= LONGEST else kind(value)


def networks_of(model) -> str:
    """What a message adds where a diffusers pipeline came in a network's place: where its networks
    are; nothing for anything else."""
    if "DiffusionPipeline" not in (cls.__name__ for cls in type(model).__mro__):
        return ""
    names = [f".{name}" for name, part in vars(model).items() if isinstance(part, nn.Module)]
    return f", a pipeline, whose networks are its {' and '.join(names)}"


def counted(count: int, noun: str) -> str:
    """Such as "1 file", "2 files"; of a noun of several words, the first is counted."""
    first, *rest = noun.split(" ")
    return " ".join([str(count), first if count == 1 else f"{first}s", *rest])


def check_floating(name: str, x) -> None:
    """x is a dense tensor of a floating dtype the ops know."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: wanted float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: wanted a dense (strided) tensor, got layout {x.layout}")


def check_sample(name: str, x) -> None:
    """x is a floating tensor [B, *]."""
    check_floating(name, x)
    if x.dim() < 1:
        raise ValueError(f"{name}: wanted shape [B, *], got a scalar tensor")


def check_like(name: str, tensor, x_name: str, x: Tensor) -> None:
    """tensor has x's shape, dtype and device."""
    check_floating(name, tensor)
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name}: wanted {x_name}'s shape {list(x.shape)}, got {list(tensor.shape)}"
        )
    check_same_kind(name, tensor, x_name, x)


def check_same_kind(name: str, tensor: Tensor, x_name: str, x: Tensor) -> None:
    """tensor has x's dtype and device."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: wanted {x_name}'s dtype {x.dtype}, got {tensor.dtype}")
    check_device(name, tensor, x.device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: wanted a tensor on {device}, got one on {tensor.device}")


def check_int64(name: str, tensor, device: torch.device) -> None:
    """tensor is an int64 tensor on device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: wanted an int64 tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: wanted dtype torch.int64, got {tensor.dtype}")
    check_device(name, tensor, device)


def check_indices(name: str, tensor, count: int, device: torch.device) -> None:
    """tensor is int64 [count] on device (seeds, timesteps)."""
    check_int64(name, tensor, device)
    if tensor.shape != (count,):
        raise ValueError(f"{name}: wanted shape [{count}], got {list(tensor.shape)}")


def check_number(name: str, value) -> None:
    """value is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # in torch.compile's symbols there is no isfinite
        raise ValueError(f"{name}: wanted a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: wanted a float, or an int of 64 bits, got {value}")


def check_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: wanted True or False, got {type(value).__name__}")


def is_infinite(value) -> bool:
    """Whether it is the number +∞, where a check of finite ones comes next."""
    return isinstance(value, float) and value == math.inf


def check_at_least_1(name: str, value) -> None:
    """value is an int from 1 on."""
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}: wanted at least 1, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name}: wanted an int of 64 bits, got {value}")


def check_dtype(dtype) -> None:
    """dtype is one that the ops know."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        got = dtype if isinstance(dtype, torch.dtype) else shown(dtype)
        raise TypeError(f"dtype: wanted float16, bfloat16, float32 or float64, got {got}")


def as_device(device) -> torch.device:
    """A device that torch finds here, as torch names it. "meta" is everywhere."""
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"device: wanted a torch device like cpu, got {type(device).__name__}")
    try:
        found = torch.device(device)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"device: wanted a torch device like cpu, got {device!r}") from error
    if found.type not in ("cpu", "meta") and not _is_here(found):
        raise ValueError(
            f"device: wanted one that torch {torch.__version__} finds on this machine, such as "
            f"cpu, got {device!r}"
        )
    return found


def _is_here(device: torch.device) -> bool:
    """Whether torch finds the device. Nothing is started on it."""
    if torch.compiler.is_compiling():
        return True
    try:
        module = torch.get_device_module(device)
        return module.is_available() and (device.index or 0) < module.device_count()
    except (RuntimeError, AttributeError, ImportError):  # torch was built without it
        return False


def numbered(device: Device) -> torch.device:
    """The device; "cuda" without an index becomes the current GPU."""
    if isinstance(device, torch.device) and device.index is not None:
        return device  # a tensor's own, most often
    device = as_device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_eta(eta) -> None:
    """eta is a number from 0 (deterministic) to 1 (DDPM's posterior variance)."""
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: wanted a number from 0 to 1, got {eta}")


def check_at_least_0(name: str, value) -> None:
    """value is a number from 0 on."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: wanted a number of at least 0, got {value}")


def check_choice(name: str, value, choices: tuple) -> None:
    """value is one of the choices: strings, ints, None. A tensor or an array is none of them, and
    is not asked whether it is equal."""
    scalar = isinstance(value, (str, int, np.integer, type(None))) and not isinstance(value, bool)
    if not scalar or value not in choices:
        names = tuple(sorted(choices, key=str))
        near = did_you_mean(value, filter(_is_text, names)) if _is_text(value) else ""
        raise ValueError(f"{name}: wanted one of {names}, got {shown(value)}{near}")


def did_you_mean(name: str, known: Iterable[str] | Mapping[str, object]) -> str:
    """The end of a message that there is no such name: the known one that is nearest, if any is
    near. Args: known: the names; or what to show for each."""
    named = known if isinstance(known, Mapping) else {one: one for one in known}
    folded = {one.casefold(): one for one in named}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"; did you mean {named[folded[near[0]]]}?" if near else ""


def _is_text(value) -> bool:
    return isinstance(value, str)


def check_interval(name: str, value) -> None:
    """value is (low, high), 0 <= low <= high; high may be infinite."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: wanted (low, high), got {shown(value)}")
    check_at_least_0(name, value[0])
    if not is_infinite(value[1]):
        check_at_least_0(name, value[1])
    if value[0] > value[1]:
        raise ValueError(f"{name}: wanted low <= high, got {value}")


def check_clip(clip) -> None:
    """clip is None or a number above 0."""
    if clip is None:
        return
    check_number("clip", clip)
    if clip <= 0:
        raise ValueError(f"clip: wanted a number above 0 or None, got {clip}")


def check_sizes(shape, wanted: str) -> tuple[int, ...]:
    """shape as a tuple of at least one int, each >= 0."""
    try:
        sizes = None if isinstance(shape, (str, bytes)) else tuple(shape)
    except TypeError:  # arrays and tensors without axes say so only when they are iterated over
        sizes = None
    if sizes is None:
        raise TypeError(f"shape: wanted {wanted}, got {shown(shape)}")
    shape = sizes
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in shape):
        raise TypeError(f"shape: wanted {wanted} of ints, got {shown(shape)}")
    if not shape or min(shape) < 0:
        raise ValueError(f"shape: wanted {wanted} of sizes >= 0, got {shown(shape)}")
    elements = 1
    for n in shape:  # a loop, which torch.compile follows
        elements *= max(n, 1)
    if elements >= 2**60:
        raise ValueError(f"shape: wanted {wanted} that a memory may hold, got {shown(shape)}")
    return tuple(int(n) for n in shape)


def check_in_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Every value of an int64 tensor on the host lies in [low, high].

    Values in device memory are not read (that would stall the stream): there the kernel traps.
    """
    if tensor.device.type != "cpu" or tensor.numel() == 0 or hides_its_values(tensor):
        return
    if tensor.numel() <= 64:  # a list is cheaper than a reduction
        values = tensor.tolist()
        values = values if isinstance(values, list) else [values]
        least, most = min(values), max(values)
    else:
        least, most = (int(v) for v in tensor.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: wanted values from {low} to {high}, got {least} to {most}")


def as_timestep(name: str, t, x: Tensor, low: int, high: int) -> int | Tensor:
    """A timestep of samples x [B, *]: an int where the host has one for all of them, else int64 []
    or [B] on x's device.

    Args: t: an int of Python's or numpy's, or integers [] or [B] of any dtype, which are waited for
        on no device but the CPU. low, high: between which it lies, as far as the host can tell.
    """
    if isinstance(t, np.ndarray):
        t = torch.from_numpy(t) if t.ndim else t[()]
    if not isinstance(t, Tensor):
        if isinstance(t, bool) or not isinstance(t, (int, np.integer)):
            raise TypeError(f"{name}: wanted an int64 tensor or an int, got {type(t).__name__}")
        if not low <= t <= high:
            raise ValueError(f"{name}: wanted from {low} to {high}, got {t}")
        return t if isinstance(t, int) else int(t)
    int64 = t.dtype == torch.int64
    if not int64 and (t.dtype == torch.bool or t.is_floating_point() or t.is_complex()):
        raise TypeError(f"{name}: wanted dtype torch.int64, or other integers, got {t.dtype}")
    scalar = t.dim() == 0
    if not scalar and t.shape != x.shape[:1]:
        raise ValueError(f"{name}: wanted shape [] or [{len(x)}], got {list(t.shape)}")
    check_in_range(name, t, low, high)
    if scalar and t.device.type == "cpu" and not hides_its_values(t):
        return int(t)
    return t if int64 and t.device == x.device else moved(t, x.device, torch.int64)


def hides_its_values(tensor: Tensor) -> bool:
    """Whether it stands for values that a program, or a transform of torch.func, is yet to have."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def as_seeds(seeds, batch: int, device: torch.device) -> Tensor:
    """Seeds [B] int64 on device, from an int (sample b gets seed + b) or a tensor."""
    if isinstance(seeds, bool) or not isinstance(seeds, (int, np.integer, Tensor)):
        raise TypeError(f"seeds: wanted an int or an int64 tensor [B], got {type(seeds).__name__}")
    if not isinstance(seeds, Tensor):
        seeds = int(seeds)
        if not -(2**63) <= seeds <= 2**63 - 1:
            raise ValueError(f"seeds: wanted an int of 64 bits, got {seeds}")
        return torch.full((batch,), seeds, device=device) + torch.arange(batch, device=device)
    check_indices("seeds", seeds, batch, seeds.device)
    return moved(seeds, device)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on that device. On its way to a GPU it is not waited for."""
    return tensor.to(device, dtype, non_blocking=torch.device(device).type == "cuda")
