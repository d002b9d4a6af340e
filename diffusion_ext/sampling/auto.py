"""The engine "auto": of all ways to run a network, the one that was measured to be fastest here."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..fusing import fuse
from ..nn import optimize_for_sampling
from ..nn.context_unet import ContextUnet
from ..nn.optimized import OptimizedContextUnet
from ..ops import backend, choices, measuring
from . import graphs
from .exports import tracing
from .kept import digest_of_weights, keep_last
from .networks import watched
from .runtimes import RUNTIMES, missing

TURN = 0.1  # seconds for which a way is timed in each round
SLOW = ("openvino", "onnxruntime", "compile")  # to make; the quickest first
GAIN = 1.05  # what a way must gain over those before it, which need less of all else
KEPT = 4  # ways of a model that are kept, the last ones used

# model -> {kind of run: (digest of the weights, way)}. No way refers to its model.
_kept: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Way:
    """An engine and what it runs.

    Attributes:
        copy: of the model, in its place; None is the model itself.
        memory_format: of its inputs; None is that of the model.
    """

    engine: str
    copied: str = ""  # how the copy was made: "fused", "optimized"
    copy: nn.Module | None = None
    memory_format: torch.memory_format | None = None

    def of(self, model: Callable) -> Callable:
        return model if self.copy is None else self.copy

    @property
    def name(self) -> str:
        if not self.copied:
            return self.engine
        return self.copied if self.engine == "eager" else f"{self.copied}, {self.engine}"


def fastest(
    model: Callable,
    x: Tensor,
    context,
    begin: Callable[[Way], object],
    rows: range,
    graph: bool,
    progress: bool,
) -> Way:
    """The fastest way to run model, measured where that is not known.

    Args:
        x: [B,*], the samples. context: of the model's calls. begin(way): the stepper of a run, of
        these rows. graph: whether it may be a CUDA graph.
    """
    makers = _makers(model, x, context, graph)
    if len(makers) == 1:
        return Way("eager")
    kept, kind = _kept.setdefault(model, {}), _kind(x, context, graph)
    weights, way = kept.pop(kind, (None, None))
    if way is None:
        with tracing:  # nor would two threads' times mean much
            way = _chosen(model, x, kind, makers, partial(_calls, begin, rows), progress)
        weights = _copied_weights(way, model)
    elif (now := _copied_weights(way, model)) != weights:
        way, weights = makers[way.name](), now
    keep_last(kept, kind, (weights, way), KEPT)
    return way


def _copied_weights(way: Way, model: nn.Module) -> int | None:
    """A digest of the weights, where a copy has to follow them."""
    return None if way.copy is None else digest_of_weights(model)


def _makers(model: Callable, x: Tensor, context, graph: bool) -> dict[str, Callable[[], Way]]:
    """Name -> a maker of the way, the one that needs least first."""
    ways = [(Way("eager"), None)]
    device = x.device.type
    free = isinstance(model, nn.Module) and not watched(model)
    if free and not torch.is_autocast_enabled(device):
        engines = ["trace", "graph"] if graph and device in graphs.DEVICES else ["trace"]
        ways += [(Way(engine), None) for engine in engines]
        how, make = _copying(model, x, context)
        if how:
            ways += [(Way(engine, how), make) for engine in ("eager", *engines)]
        ways.append((Way("compile"), None))
        if (device, x.dtype) == ("cpu", torch.float32):
            ways += [(Way(runtime), None) for runtime in RUNTIMES if not missing(runtime)]
    return {way.name: partial(_made, way, make) for way, make in ways}


def _copying(model: nn.Module, x: Tensor, context) -> tuple[str, Callable | None]:
    """How a faster copy of model is called, and what makes it."""
    if type(model) is OptimizedContextUnet:
        return "", None
    if type(model) is ContextUnet:
        batch = len(context) if isinstance(context, Tensor) else len(x)
        return "optimized", lambda: {"copy": optimize_for_sampling(model, batch)}
    return "fused", partial(_fused, model, x)


def _made(way: Way, make: Callable | None) -> Way:
    return way if make is None else replace(way, **make())


def _fused(model: nn.Module, x: Tensor) -> dict:
    """A fused copy that shares the model's weights; on a CPU in the memory format that our
    convolutions want.

    Raises: RuntimeError where there is nothing to fuse.
    """
    weights = itertools.chain(model.parameters(), model.buffers())
    fused = copy.deepcopy(model, {id(t): t for t in weights})
    report = fuse(fused)
    if not report.fused and not report.convolutions:
        raise RuntimeError("nothing in it to fuse")
    channels_last = x.is_cpu and x.dim() == 4
    return {"copy": fused, "memory_format": torch.channels_last if channels_last else None}


def _chosen(model, x: Tensor, kind: str, makers: dict, calls, progress: bool) -> Way:
    """The way that a file names or, where none does, the clock."""
    detail = f"{kind} {_described(model)}"
    of = f'sample(engine="auto"), {_name(model)}, {"x".join(map(str, x.shape))}, {x.dtype}'
    known = choices.find(of, detail, x.device)
    if known is not None and known.taken in makers:
        with contextlib.suppress(Exception):  # then the clock says what is left
            return makers[known.taken]()
    ways: dict[str, Way] = {}

    def begun(name: str) -> measuring.Calls:
        ways[name] = makers[name]()
        return calls(ways[name])

    turns = {name: partial(begun, name) for name in sorted(makers, key=_slowness)}
    forked = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
    with forked, _told(list(turns), progress) as trying:
        measured = measuring.measure(turns, x.device, TURN, trying)
    taken = _worth_it(list(makers), measured.seconds)
    choice = choices.keep(of, detail, x.device, taken, measured)
    if progress:
        print(f"engine: {taken}; {choice.how}", file=sys.stderr, flush=True)
    return ways[taken]


def _slowness(name: str) -> int:
    return SLOW.index(name) + 1 if name in SLOW else 0


def _worth_it(order: list[str], seconds: dict[str, float]) -> str:
    """The last one in this order that gains enough over those before it."""
    first, *others = (name for name in order if name in seconds)
    for name in others:
        first = name if seconds[first] > GAIN * seconds[name] else first
    return first


@contextlib.contextmanager
def _told(names: list[str], progress: bool) -> Iterator[Callable[[str], object]]:
    """Called with each way: it shows in a bar on a terminal, a log has a line at the beginning."""
    if progress and not sys.stderr.isatty():
        told = f"measuring engines, once, for up to a minute: {'; '.join(names)}"
        print(told, file=sys.stderr, flush=True)
    hidden = not (progress and sys.stderr.isatty())
    with tqdm(total=len(names), desc="measuring engines", unit="way", disable=hidden) as bar:

        def show(name: str) -> None:
            bar.update()
            bar.set_postfix_str(name)

        yield show


def _calls(begin: Callable[[Way], object], rows: range, way: Way) -> Iterator[Callable[[], None]]:
    """Steps of one run after another."""
    while True:
        stepper = begin(way)
        for row in rows:
            yield partial(stepper.advance, row)
        stepper.result()


def _kind(x: Tensor, context, graph: bool) -> str:
    """What of a run its fastest way depends on."""
    leaves, structure = pytree.tree_flatten((x, context))
    shapes = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in leaves]
    place = x.device, torch.get_num_threads(), backend.current_backend()
    return repr((shapes, str(structure), graph, *place))


def _described(model: nn.Module) -> str:
    """A network's layers and their sizes."""
    return "\n".join([repr(model), *(type(module).__name__ for module in model.modules())])


def _name(model: nn.Module) -> str:
    """Such as DiffusersModel(UNet2DModel)."""
    children, name = list(model.children()), type(model).__name__
    return f"{name}({type(children[0]).__name__})" if len(children) == 1 else name
