"""A network written down once as a program of tensors alone, and run as that."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..ops import backend
from .kept import digest_of_weights, keep_last
from .runtimes import RUNTIMES

KEPT = 4  # exports of a model, the last ones used
TOLERANCE = 1e-3  # of the largest output, to which an export gives what its model gives

# torch traces for one thread at a time: it puts its own in the place of torch.nn.Module's methods.
tracing = threading.RLock()

# model -> {what an export depends on: export}. No export refers to its model.
_exports: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@dataclass
class Export:
    """A program and what it was made from.

    Attributes:
        call: the program. weights: a digest of the model's.
        t: [B], of the call that was written down, until another one has shown that it holds there.
    """

    call: Callable[..., Tensor]
    weights: int
    t: Tensor | None


class ExportedNetwork:
    """model(x [B,*], t [B], context) by the program that `way` makes of it.

    It is made when inputs of such shapes come first, and anew where the weights, compared at the
    start of each run, are others. What else changes in the module's Python goes unnoticed.
    """

    def __init__(self, way: str, model: nn.Module):
        self.way, self.model = way, model
        self._weights = digest_of_weights(model)

    def __call__(self, x: Tensor, t: Tensor, context) -> Tensor:
        leaves, structure = pytree.tree_flatten(context)
        tensors = [x, t, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        export = self._export(tensors, (x, t, context), self._key(tensors, leaves, structure))
        y = export.call(*tensors)
        if export.t is not None and not torch.equal(t, export.t):
            self._prove(y, x, t, context)
            export.t = None
        return y

    def _export(self, tensors: list[Tensor], arguments: tuple, key: tuple) -> Export:
        with tracing:  # other threads wait for the export that they want too
            kept = _exports.setdefault(self.model, {})
            export = kept.pop(key, None)
            if export is None or export.weights != self._weights:
                inputs = tuple(t.clone() for t in tensors)
                call = exported(self.way, OfTensors(self.model, *arguments), inputs)
                export = Export(call, self._weights, inputs[1])
            keep_last(kept, key, export, KEPT)
        return export

    def _key(self, tensors: list[Tensor], leaves: list, structure) -> tuple:
        device = tensors[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        described = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        settings = autocast, torch.get_num_threads(), backend.current_backend()
        fixed = [repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]  # written down too
        return self.way, *settings, str(structure), *fixed, *described

    def _prove(self, y: Tensor, x: Tensor, t: Tensor, context) -> None:
        """Raises: RuntimeError where y is not what the model gives: it has looked at numbers that
        were written down as they were, or drawn some."""
        wanted = self.model(x, t, context)
        bound = TOLERANCE * wanted.abs().nan_to_num(0, 0, 0).max().item()
        if not torch.allclose(y, wanted, rtol=0, atol=bound, equal_nan=True):
            _exports.pop(self.model, None)
            raise RuntimeError(
                f"engine: {self.way!r} does not give what {type(self.model).__name__} gives, which "
                "looks at its inputs' values (.numpy(), .item()) or draws numbers; "
                "engine='eager' runs any model"
            )


def exported(way: str, network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """network(*inputs) as a callable of tensors of the inputs' shapes.

    Raises: RuntimeError where it cannot be exported.
    """
    with torch.no_grad(), _quietly():
        try:
            return WAYS[way](network, inputs)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"engine: {way!r} cannot export this network: {type(error).__name__}: "
                f"{first_line[:300]}; engine='eager' runs any model"
            ) from error


def _traced(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    """The operators that one call ran, ours among them, without the Python around them."""
    # What a first call makes and keeps, such as filters, is not to be written down.
    network(*inputs)
    return make_fx(network)(*inputs)


WAYS = {"trace": _traced, **RUNTIMES}


class OfTensors(nn.Module):
    """model(*arguments, **options) of the tensors in them alone, as an export wants its inputs.

    Attributes:
        tensors: those of the arguments and options, in the order in which forward wants such.
    """

    def __init__(self, model: nn.Module, *arguments, **options):
        super().__init__()
        self.model = model
        leaves, self.structure = pytree.tree_flatten((arguments, options))
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        leaves = [next(rest) if fixed is None else fixed[0] for fixed in self.leaves]
        arguments, options = pytree.tree_unflatten(leaves, self.structure)
        return self.model(*arguments, **options)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' warnings and lines, which speak of their own works."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
