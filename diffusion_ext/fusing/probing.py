"""What other people's modules compute, told by their results rather than by their classes.

A module is run on a few numbers, with parameters of its size that are drawn at random, and its
results are compared with the formulas that our ops have. What it is found to be holds as long as
its configuration stays: its attributes, those of its classes, its children. What a class reads
elsewhere, in globals say, is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random as stdlib_random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.reference import ACTIVATIONS
from .stand_in import StandIn, class_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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
        before = configuration(twin)
        inputs = {dim: random(2, _channels(norm), *sizes) for dim, sizes in SHAPES.items()}
        for act in ACTIVATIONS:
            whole, by_frame = _formulas(twin, act)
            # Of small numbers too, where eps counts.
            dims = tuple(d for d, x in inputs.items() if agrees(twin, x, whole, 1e-3 * x))
            x = inputs[5]
            frames = 5 not in dims and agrees(twin, x, by_frame, 1e-3 * x)
            if dims or frames:
                rounds = _rounds(twin, inputs[dims[0] if dims else 5], whole if dims else by_frame)
                same = before is not None and configuration(twin) == before
                return NormKind(act, rounds, dims, frames) if same and rounds is not None else None
    return None


def activation_name(module: nn.Module) -> str | None:
    """Which of group_norm_act's activations a module without parameters computes, if any."""
    if module._parameters or module._buffers or module._modules:
        return None
    with apart():
        x = torch.linspace(-40, 40, 960, dtype=torch.float32).view(2, 4, 10, 12)
        x[0, 0, 0, :3] = torch.tensor([-1e3, 1e3, float("nan")])
        twin = twin_of(module)
        before = configuration(twin)
        for name, formula in ACTIVATIONS.items():
            if name != "identity" and agrees(twin, x, formula, x.flatten(2)):
                keeps_its_dtype = twin(x.bfloat16()).dtype == torch.bfloat16
                same = before is not None and configuration(twin) == before
                return name if keeps_its_dtype and same else None
    return None


def computes_conv2d(conv: nn.Conv2d) -> bool:
    """Whether conv, of a subclass of Conv2d, computes what Conv2d does with its settings."""
    if conv._buffers or conv._parameters.keys() - {"weight", "bias"}:
        return False
    sides = [d * (k - 1) + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    return _computes(conv, nn.Conv2d._conv_forward, conv.in_channels, *sides)


def computes_linear(layer: nn.Linear) -> bool:
    """Whether layer, of a subclass of Linear, computes what Linear does."""
    if layer._buffers or layer._parameters.keys() - {"weight", "bias"}:
        return False
    return _computes(layer, lambda _, x, weight, bias: F.linear(x, weight, bias), layer.in_features)


def _computes(module: nn.Module, formula: Callable, *sizes: int) -> bool:
    """Whether module computes formula(module, x, weight, bias) of x [2, *sizes], and no state of it
    changes, which would be lost where ours serve."""
    with apart():
        twin, x = twin_of(module), random(2, *sizes)
        before, parameters = configuration(twin), (twin.weight, twin.bias)
        if before is None or not agrees(twin, x, lambda x: formula(twin, x, *parameters)):
            return False
        return configuration(twin) == before


def runs_conv3d(conv: nn.Conv3d) -> bool:
    """Whether the forward of conv, of a subclass of Conv3d, has Conv3d convolve with its weight."""
    seen = []

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(weight is twin.weight and bias is twin.bias)
        return nn.Conv3d._conv_forward(twin, x, weight, bias)

    with apart():
        twin = twin_of(conv)
        twin.__dict__["_conv_forward"] = convolve
        sides = [d * (k - 1) + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        with contextlib.suppress(Exception):  # as in _agree
            twin(random(1, conv.in_channels, *sides))
    return bool(seen) and all(seen)


def looks_like_a_group_norm(module: nn.Module) -> bool:
    """Whether module has the attributes of a GroupNorm."""
    groups, eps = vars(module).get("num_groups"), vars(module).get("eps")
    if isinstance(groups, bool) or not isinstance(groups, int) or not isinstance(eps, float):
        return False
    return module._parameters.keys() == {"weight", "bias"} and not module._buffers


@dataclass(frozen=True)
class Configuration:
    """All that a module's class may look at besides parameters.

    Attributes:
        count: of the instance's attributes. values: (name, value, whether it is compared as it is)
            of those, and of its classes', that not every module has.
        children: (name, class, configuration) of each; None where they are called as they are, so
            that what they are does not matter.
    """

    count: int
    values: tuple[tuple[str, object, bool], ...]
    children: tuple[tuple[str, type, Configuration], ...] | None

    def is_empty(self) -> bool:
        """Whether there is nothing to compare, other than how many attributes there are."""
        return not (self.values or self.children)

    def holds(self, module: nn.Module) -> bool:
        """Whether module, of the same class, still has it."""
        if _count(module) != self.count:
            return False
        for name, value, as_it_is in self.values:
            now = getattr(module, name, None)
            now = now if as_it_is else _listed(now)
            if type(now) is not type(value) or now != value:
                return False
        children = module._modules
        if self.children is None:
            return True
        return len(children) == len(self.children) and all(
            class_of(child := children.get(name)) is cls and of.holds(child)
            for name, cls, of in self.children
        )


def configuration(module: nn.Module, with_children: bool = True) -> Configuration | None:
    """module's, as it is now; None where some of it cannot be compared."""
    own = {*vars(module)} - _OF_TORCH - {*_notes(module)}
    try:
        values = tuple(
            (name, _comparable(value := getattr(module, name)), not isinstance(value, _MUTABLE))
            for name in sorted(own | _data_attributes(type(module)))
        )
    except TypeError:
        return None
    if not with_children:
        return Configuration(_count(module), values, None)
    children = tuple(
        (name, class_of(child), configuration(child))
        for name, child in module._modules.items()
        if child is not None
    )
    if len(children) < len(module._modules) or any(of is None for _, _, of in children):
        return None
    return Configuration(_count(module), values, children)


# --- how they are run -----------------------------------------------------------------------------

_OF_TORCH = frozenset(vars(nn.Module()))  # what every module has
_MUTABLE = (list, dict)


def _notes(module: nn.Module) -> tuple[str, ...]:
    return module.notes if isinstance(module, StandIn) else ()


def _count(module: nn.Module) -> int:
    """Of module's attributes, without what `fuse` has written there."""
    attributes = module.__dict__
    return len(attributes) - sum(note in attributes for note in _notes(module))


@functools.cache
def _data_attributes(cls: type) -> frozenset[str]:
    """Names of what cls and its bases before torch's have that is no method."""
    return frozenset(
        name
        for owner in cls.__mro__
        if not owner.__module__.startswith(("torch.nn.", __package__)) and owner is not object
        for name, value in vars(owner).items()
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
    )


_COMPARED = (bool, int, float, str, torch.dtype, torch.device, type(None))


def _comparable(value):
    """value, or a copy of what may change in place. Raises: TypeError where == is not for it."""
    value = _listed(value)
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, tuple):
            _comparable(part)
        elif isinstance(part, nn.Module) or not (isinstance(part, _COMPARED) or callable(part)):
            raise TypeError(type(part).__name__)
    return value


def _listed(value):
    """A list or dictionary as a tuple, so that it does not change with the original."""
    return (
        tuple(value.items() if isinstance(value, dict) else value)
        if isinstance(value, _MUTABLE)
        else value
    )


@contextlib.contextmanager
def apart():
    """Without gradients, and without a draw from the CPU's generators, torch's and Python's."""
    state = stdlib_random.getstate()
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
    ):
        try:
            yield
        finally:
            stdlib_random.setstate(state)


def random(*shape: int) -> Tensor:
    """Normals, float32 whatever torch's default is; the same few thousand again and again, for a
    large weight would take a third of a second."""
    few = torch.randn(4099, dtype=torch.float32)  # a prime, which no size of a weight shares
    return few.repeat(math.prod(shape) // len(few) + 1)[: math.prod(shape)].view(shape)


def twin_of(module: nn.Module) -> nn.Module:
    """A copy that nobody watches, with parameters of its own: float32 on the CPU and drawn at
    random, for what is ones or zeros would hide what it is used for, and large, so that a bound is
    met."""
    twin = copy.copy(module)
    own = twin.__dict__
    own["_parameters"] = {
        name: None if p is None else nn.Parameter(8 * random(*p.shape))
        for name, p in module._parameters.items()
    }
    own["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    own.update({n: v.copy() for n, v in own.items() if isinstance(v, (list, dict, set))})
    own["_modules"] = {n: None if c is None else twin_of(c) for n, c in module._modules.items()}
    own.update({hooks: OrderedDict() for hooks in HOOKS})
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


def agrees(
    module: nn.Module, x: Tensor, formula: Callable, *others: Tensor, run: Callable | None = None
) -> bool:
    """Whether module, or `run` of it, computes formula of all inputs, in training and in
    evaluation, and has its gradients."""
    for mode in (True, False):
        module.train(mode)
        if not all(_agree(run or module, y, formula) for y in (x, *others)):
            return False
    return True


def _agree(run: Callable[[Tensor], Tensor], x: Tensor, formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether run(x) is formula(x), and its gradient formula's."""
    try:
        ours, theirs = (_with_gradient(f, x) for f in (formula, run))
        return all(
            torch.allclose(
                a, b, rtol=1e-4, atol=1e-5 * max(1, b.nan_to_num().abs().max()), equal_nan=True
            )
            for a, b in zip(theirs, ours, strict=True)
        )
    except Exception:  # whatever a stranger's forward raises: it is not for such an input
        return False


def _with_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), and the gradient of a sum of it; the draws of f are the same each time."""
    torch.default_generator.manual_seed(0)  # torch's own function would seed a GPU's too
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = f(x.clone())
        (gradient,) = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), x)
    return y.detach(), gradient


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
