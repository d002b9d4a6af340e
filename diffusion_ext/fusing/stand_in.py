"""Classes that stand in for others: what `diffusion_ext.fuse` makes of a module's class.

Other libraries look at a layer's type and build another one of it: adapters (peft's LoRA), torch.ao
quantisation, whoever copies by class. So to all of them a stand-in is the class that it stands for:
it is a subclass of it and has its name, it equals it where types are compared or looked up in a
table, and to call it constructs the original, for a layer that others build is not ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn
from torch._guards import TracingContext


class _StandInType(type):
    """The type of stand-ins; `original` is the class that one stands for."""

    def __call__(cls, *args, **kwargs):
        return cls.original(*args, **kwargs)

    def __eq__(cls, other) -> bool:
        # torch.compile finds where super() goes on by comparing the classes of a method resolution
        # order, in which a stand-in stands before its original: there they have to differ.
        return other is cls or (other is cls.original and TracingContext.try_get() is None)

    def __hash__(cls) -> int:
        return hash(cls.original)


class StandIn(nn.Module):
    """A module whose class `swap_class` has changed, and nothing else of it.

    Parameters, submodules, hooks and names stay the very same objects. `notes` names what `fuse`
    writes down in an instance.
    """

    notes: tuple[str, ...] = ()

    def _get_name(self) -> str:  # in a printed model
        return type(self).fused.__name__

    def __reduce_ex__(self, protocol):  # pickle and copy cannot find the class by its name
        fused, original = type(self).fused, type(self).original
        return _blank, (fused, original), *super().__reduce_ex__(max(protocol, 2))[2:]

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name == "qconfig" and value is not None:  # torch.ao will replace it, by its exact class
            restore_class(self)

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script compiles a class's source
        restore_class(self)
        return self


def swap_class(module: nn.Module, fused: type[StandIn]) -> None:
    """Make module a `fused`, which stands for what it was."""
    module.__class__ = _stand_in(fused, type(module))


def restore_class(module: nn.Module) -> None:
    """Give module the class that it had, where it was swapped.

    Not where its forward has been replaced on the instance since, as accelerate's hooks do: what
    stands there calls the forward of the class of today.
    """
    if "original" not in vars(type(module)):  # not ours, or parametrized since
        return
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:  # put back by what took it
        forward = None
        del module.__dict__["forward"]
    if forward is None:
        for note in module.notes:
            module.__dict__.pop(note, None)
        module.__class__ = type(module).original


def class_of(module) -> type:
    """The class that module had before `fuse`."""
    return type(module).original if isinstance(module, StandIn) else type(module)


@functools.cache
def _stand_in(fused: type[StandIn], original: type) -> _StandInType:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if _takes_anything(fused.forward):
        names["forward"] = _signed(fused.forward, original.forward)
    return _StandInType(
        original.__name__, (fused, original), names | {"fused": fused, "original": original}
    )


def _takes_anything(forward: Callable) -> bool:
    """Whether forward is a stand-in's own, (self, *args, **kwargs)."""
    _, first, *_ = inspect.signature(forward).parameters.values()
    return forward is not nn.Module.forward and first.kind is inspect.Parameter.VAR_POSITIONAL


def _signed(forward: Callable, original: Callable) -> Callable:
    """forward(self, *args, **kwargs) with the original's signature, by which exporters and tracers
    name the inputs."""

    @functools.wraps(original)
    def signed(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return signed


def _blank(fused: type[StandIn], original: type) -> nn.Module:
    """A stand-in without any state, as unpickling and copying want it."""
    cls = _stand_in(fused, original)
    return cls.__new__(cls)


def hooked(module: nn.Module) -> bool:
    """Whether someone watches or changes what goes through this very module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
    )
