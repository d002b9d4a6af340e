"""The process of one way: it makes the parts ready, and then times them when it is asked to."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from ...checks import did_you_mean
from ...ops import measuring
from ...ops.memory import peak_memory
from ...training.weights_files import weights_near
from .context_unet import context_unet
from .diffusers_folder import BUILT_IN, is_diffusers_folder
from .diffusers_model import diffusers_model
from .subject import Part, Request, Subject

CONTEXT_UNET = "context-unet"
NAMES = (CONTEXT_UNET, *BUILT_IN)


@dataclass(frozen=True)
class Ready:
    """What a way's process tells once its parts have run.

    Attributes:
        title, shape, advice, notes: of the subject.
        parts: (name, uses) of each. outputs: what each has computed.
        seconds: until then: weights, export, compilation and each part's first call.
        peak: the most bytes that the process has held at once; 0 where that is not known.
    """

    title: str
    shape: tuple[int, ...]
    advice: list[str]
    notes: list[str]
    parts: list[tuple[str, int]]
    outputs: list[np.ndarray] = field(repr=False)
    seconds: float
    peak: int = 0


def subject(request: Request) -> Subject:
    """Raises: ValueError, OSError for a model that is not there or not known."""
    if request.model == CONTEXT_UNET:
        return context_unet(request)
    if request.model in BUILT_IN or is_diffusers_folder(Path(request.model)):
        return diffusers_model(request)
    if Path(request.model).exists():
        return context_unet(request, Path(request.model))
    known = {**weights_near(Path(request.model)), **{name: name for name in NAMES}}
    raise FileNotFoundError(
        f"model: no file or folder {request.model}; wanted one, or {', '.join(NAMES)}"
        f"{did_you_mean(Path(request.model).name, known)}"
    )


def serve(connection: Connection) -> None:
    """Receives a `Request` and sends a `Ready`, or the error; then, for each (part, seconds), the
    times of its calls, until the connection ends."""
    if hasattr(os, "setsid"):
        os.setsid()
    with contextlib.suppress(EOFError, ConnectionError):
        request = connection.recv()
        try:
            with torch.no_grad():
                _serve(connection, request)
        except Exception as error:
            connection.send(error_without_cause(error))


def error_without_cause(error: Exception) -> Exception:
    """One that can be sent: a cause or an argument of torch's may not be."""
    kinds = (ValueError, TypeError, OSError, ImportError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    text = str(error).strip() or type(error).__name__
    return kind(text if kind is not RuntimeError else f"{type(error).__name__}: {text}")


def _serve(connection: Connection, request: Request) -> None:
    start = time.perf_counter()
    of, device = subject(request), torch.device(request.device)
    outputs = [part.call().float().cpu().numpy() for part in of.parts]
    parts = [(part.name, part.uses) for part in of.parts]
    seconds, peak = time.perf_counter() - start, peak_memory()
    connection.send(Ready(of.title, of.shape, of.advice, of.notes, parts, outputs, seconds, peak))
    while True:
        index, seconds = connection.recv()
        connection.send(timed(of.parts[index], seconds, device))


def timed(part: Part, seconds: float, device: torch.device) -> list[float]:
    """Seconds of one use, for each of the calls that fit; at least one. A call before them, if it
    is short, finds the caches as the other ways have left them."""
    once = measuring.seconds(part.call, device)
    if once >= seconds:
        return [once / part.per_call]
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(measuring.seconds(part.call, device) / part.per_call)
    return times
