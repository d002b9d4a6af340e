"""What other people's modules compute, told by their results rather than by their classes.

A module is run on a few numbers, with parameters of its size that are drawn at random, and its
results are compared with the formulas that our ops have. What it is found to be holds as long as
its configuration stays, which is all that its class may look at besides its parameters.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.reference import ACTIVATIONS
from .stand_in import StandIn

SHAPES = {3: (5,), 4: (3, 4), 5: (2, 3, 4)}  # dimensions of an input -> its sizes after [N, C]


@dataclass(frozen=True)
class NormKind:
    """A group norm, as a module computes it.

    Attributes:
        act: the activation that it applies itself.
        rounds: whether it is float32 within and returns its input's dtype, under autocast too.
        dims: dimensions of the inputs that it normalises as F.group_norm does.
        frames: whether it normalises each frame of [N, C, F, H, W] by itself.
    """

    act: str = "identity"
    rounds: bool = False
    dims: tuple[int, ...] = tuple(SHAPES)
    frames: bool = False


def norm_kind(norm: nn.Module) -> NormKind | None:
    """What group norm norm computes; None if it is none, or not always the same one."""
    if type(norm) is nn.GroupNorm:
        return NormKind()
    if not looks_like_a_group_norm(norm):
        return None
    with apart():
        twin = twin_of(norm)
        inputs = {dim: torch.randn(2, _channels(norm), *sizes) for dim, sizes in SHAPES.items()}
        for act in ACTIVATIONS:
            whole, by_frame = _formulas(twin, act)
            dims = tuple(d for d, x in inputs.items() if _agrees(twin, x, whole))
            frames = 5 not in dims and _agrees(twin, inputs[5], by_frame)
            if dims or frames:
                rounds = _rounds(twin, inputs[dims[0] if dims else 5], whole if dims else by_frame)
                return None if rounds is None else NormKind(act, rounds, dims, frames)
    return None


def activation_name(module: nn.Module) -> str | None:
    """Which of group_norm_act's activations a module without parameters computes, if any."""
    if module._parameters or module._buffers or module._modules:
        return None
    x = torch.linspace(-9, 9, 240).view(2, 4, 5, 6)
    with apart():
        twin = twin_of(module)
        names = (name for name in ACTIVATIONS if name != "identity")
        return next((name for name in names if _agrees(twin, x, ACTIVATIONS[name])), None)


def computes_conv2d(conv: nn.Conv2d) -> bool:
    """Whether conv, of a subclass of Conv2d, computes what Conv2d does with its settings."""
    sides = [d * (k - 1) + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]

    def formula(x: Tensor) -> Tensor:
        return nn.Conv2d._conv_forward(twin, x, twin.weight, twin.bias)

    with apart():
        twin = twin_of(conv)
        return _agrees(twin, torch.randn(2, conv.in_channels, *sides), formula)


def looks_like_a_group_norm(module: nn.Module) -> bool:
    """Whether module has the attributes of a GroupNorm."""
    groups, eps = getattr(module, "num_groups", None), getattr(module, "eps", None)
    if isinstance(groups, bool) or not isinstance(groups, int) or not isinstance(eps, float):
        return False
    known = module._parameters.keys() <= {"weight", "bias"} and not module._buffers
    return known and {"weight", "bias"} <= vars(module)["_parameters"].keys()


EMPTY = ((), ())  # the configuration of a module that has nothing of its own


def configuration(module: nn.Module) -> tuple | None:
    """All that a module's class may look at besides parameters: attributes of the instance and of
    its classes that torch's classes do not have, and its children, so described too. None where
    some of it cannot be compared."""
    ours = module.notes if isinstance(module, StandIn) else ()
    known = _OF_TORCH.union(ours)
    own = {name: value for name, value in vars(module).items() if name not in known}
    own |= {name: getattr(module, name) for name in _data_attributes(type(module))}
    try:
        described = tuple((name, _comparable(value)) for name, value in sorted(own.items()))
    except TypeError:
        return None
    children = tuple((n, type(c), configuration(c)) for n, c in module._modules.items() if c)
    return None if any(of is None for _, _, of in children) else (described, children)


# --- how they are run -----------------------------------------------------------------------------

# What every module has, or our ops read at every call.
_OF_TORCH = frozenset({*vars(nn.GroupNorm(1, 1)), *vars(nn.Conv2d(1, 1, 1))})


@functools.cache
def _data_attributes(cls: type) -> tuple[str, ...]:
    """Names of what the classes before torch's have that is no method."""
    found = set()
    for owner in cls.__mro__:
        if not owner.__module__.startswith(("torch.nn.", __package__)) and owner is not object:
            found |= {
                name
                for name, value in vars(owner).items()
                if not name.startswith("__")
                and not callable(value)
                and not hasattr(value, "__get__")
            }
    return tuple(sorted(found))


def _comparable(value):
    """value, as something that can be compared and hashed. Raises: TypeError."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return tuple((key, _comparable(v)) for key, v in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type)):
        return value
    if callable(value) and not isinstance(value, nn.Module):
        return id(value)
    raise TypeError(type(value).__name__)


@contextlib.contextmanager
def apart():
    """Without gradients, and without a draw from torch's own generator."""
    apart = torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad()
    with apart[0], apart[1], apart[2], torch.device("cpu"):
        torch.manual_seed(0)
        yield


def twin_of(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own, float32 on the CPU and drawn at random, for what is ones
    or zeros would hide what it is used for."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.randn(p.shape))
        for name, p in module._parameters.items()
    }
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_modules"] = {
        n: c if c is None else twin_of(c) for n, c in module._modules.items()
    }
    return twin


def _channels(norm: nn.Module) -> int:
    weight = norm._parameters["weight"]
    return 2 * norm.num_groups if weight is None else len(weight)


def _formulas(norm: nn.Module, act: str) -> tuple[Callable, Callable]:
    """act(group norm), of all of x and of each frame of [N, C, F, H, W]."""

    def whole(x: Tensor) -> Tensor:
        parameters = (p if p is None else p.to(x.dtype) for p in norm._parameters.values())
        return ACTIVATIONS[act](F.group_norm(x, norm.num_groups, *parameters, norm.eps))

    def by_frame(x: Tensor) -> Tensor:
        return torch.stack([whole(frame) for frame in x.unbind(2)], dim=2)

    return whole, by_frame


def _agrees(module: nn.Module, x: Tensor, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether module computes formula, in training and in evaluation."""
    return all(agree(module.train(mode), x, formula) for mode in (True, False))


def agree(run: Callable[[Tensor], Tensor], x: Tensor, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether run(x) is formula(x)."""
    try:
        return torch.allclose(run(x.clone()), formula(x), rtol=1e-4, atol=1e-5)
    except Exception:  # whatever a stranger's forward raises: it is not for such an input
        return False


def _rounds(norm: nn.Module, x: Tensor, formula: Callable[[Tensor], Tensor]) -> bool | None:
    """Whether norm computes in float32 whatever x is; None where it returns another dtype."""
    rounds = False
    for dtype in (torch.bfloat16, torch.float64):
        try:
            y = norm(x.to(dtype))
        except Exception:  # torch's own takes float64 with parameters of float64 alone
            continue
        if y.dtype != dtype:
            return None
        exact = {"rtol": 1e-10, "atol": 1e-10}
        rounds = dtype == torch.float64 and not torch.allclose(y, formula(x.to(dtype)), **exact)
    return rounds
