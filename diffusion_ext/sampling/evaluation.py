"""A network in evaluation mode for as long as anybody samples from it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

_lock = threading.Lock()
# module -> [runs that sample from it now, whether it was in training mode before them]
_sampled: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation(model) -> Iterator[None]:
    """A module in evaluation mode, and afterwards as it was before the first of the runs that
    sample from it, or from parts of it, at once in several threads."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with _lock:
        for module in modules:
            _sampled.setdefault(module, [0, module.training])[0] += 1
        if modules:
            model.eval()
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _sampled[module][0] -= 1
                if not _sampled[module][0]:
                    module.training = _sampled.pop(module)[1]
