"""The engine "graph": a step captured once as a CUDA graph, replayed for every step of every run.

What a run has of its own (seeds, context, images, table) is copied into the tensors that the graph
was captured with, so that one graph serves all runs of its kind. It reads the weights as they are;
what Python does in the model, and torch's settings (TF32 ...), are as they were at the capture.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks import kind
from ..ops import backend
from .kept import keep_last
from .stepping import InPlaceStepper

DEVICES = ("cuda",)
WARM_UPS = 2  # what a library makes and chooses in its first calls, it may not in a capture
GRAPHS = 4  # of a model that are kept, the last ones used

# model -> {kind of run: graph}. No graph refers to its model, so that each goes with it.
_graphs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

_of_thread = threading.local()


class GraphStepper:
    """A stepper (see stepping.py) that replays the model's graph for such runs."""

    def __init__(self, model: Callable, stepper: InPlaceStepper):
        self._kept, self._kind = _graphs_of(model), _kind(model, stepper)
        fresh, self._alone = stepper.tensors, stepper.alone
        # Taken away while in use: a run of another thread makes its own.
        self._graph = self._kept.pop(self._kind, None) if self._kind is not None else None
        if self._graph is None:
            self._graph = Graph(model, stepper)
        self._graph.load(fresh)
        stepper.use(self._graph.tensors)
        self.x = stepper.x

    def advance(self, i: int) -> None:
        self._graph.replays[self._alone[i]]()

    def result(self) -> Tensor:
        """A copy of the sample; the graph is there for later runs."""
        images = self.x.clone()
        self._graph.used()
        if self._kind is not None:
            keep_last(self._kept, self._kind, self._graph, GRAPHS)
        return images


class Graph:
    """A captured step and the tensors that it works on, which nobody else has."""

    def __init__(self, model: Callable, stepper: InPlaceStepper):
        stepper.use(_cloned(stepper.tensors))
        self.tensors = stepper.tensors
        self.device = stepper.x.device
        self._done = None
        try:
            self.replays = {
                alone: capture(partial(stepper.advance_on_device, alone), self.tensors["row"])
                for alone in sorted(set(stepper.alone))
            }
        except Uncapturable as error:
            raise RuntimeError(
                f"engine: 'graph' cannot capture {_name(model)}: {error}. In a CUDA graph nothing "
                "may wait for the GPU (.item(), .cpu(), printing, shapes that depend on data); "
                "engine='eager' runs any model"
            ) from error.__cause__

    def load(self, tensors: dict) -> None:
        if self._done is not None:  # another stream's run may still be at work
            self._done.wait(torch.cuda.current_stream(self.device))
        leaves = zip(pytree.tree_leaves(self.tensors), pytree.tree_leaves(tensors), strict=True)
        for ours, theirs in leaves:
            if isinstance(ours, Tensor):
                ours.copy_(theirs)

    def used(self) -> None:
        if self.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(self.device))


class Uncapturable(Exception):
    """Its cause says why a step could not be captured."""


def capture(body: Callable[[], None], row: Tensor) -> Callable[[], None]:
    """A function that replays what body() does on the GPU. row: where body counts its runs."""
    stream = capture_stream(row.device)
    with torch.cuda.device(row.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                row.zero_()
                body()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                _no_collection(),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                body()
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            raise Uncapturable(f"{type(error).__name__}: {first_line}") from error
        torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """All captures of a thread on a device use this one stream: for each stream that cuBLAS has
    worked on, torch keeps a workspace, of 32 MiB on an H100. Threads may capture at once, so that
    each has its own."""
    streams = vars(_of_thread).setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


@contextlib.contextmanager
def _no_collection():
    """The collector could free another graph, which no capture allows."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cloned(tensors: dict) -> dict:
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tensors)


def _graphs_of(model: Callable) -> dict[Hashable, Graph]:
    try:
        return _graphs.setdefault(model, {})
    except TypeError:  # not one to refer to weakly, or to hash
        return {}


def _kind(model: Callable, stepper: InPlaceStepper) -> Hashable | None:
    """What of a run its graph depends on; None where that cannot be told."""
    leaves, structure = pytree.tree_flatten(stepper.tensors)
    own = []
    if isinstance(model, nn.Module):  # a graph has the addresses of the weights
        own = [t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers())]
    device = stepper.x.device.type
    kind = (
        *(_described(leaf) for leaf in leaves),
        str(structure),
        type(stepper.network),
        stepper.guidance,
        *sorted(set(stepper.alone)),
        stepper.clip,
        backend.current_backend(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        *own,
    )
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def _described(leaf) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return type(leaf), leaf


def _name(model: Callable) -> str:
    return getattr(model, "__name__", kind(model))
