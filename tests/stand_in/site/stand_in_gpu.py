"""What torch.cuda is in a process that runs on the stand-in for a GPU (stand_in.h).

With this folder on PYTHONPATH, `import torch` calls `install`, as it does for any backend that is
installed beside it. So no test may lie here: pytest puts the folders of tests on Python's path, and
some tests hand that on to processes of theirs. The libraries are those of `make emulated`:
stand_in.so, and the CUDA kernels for the emulated GPU, which stand in for diffusion_ext/_cuda.so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import time
import types
import weakref

import torch
from torch._C import StorageBase

BUILT = pathlib.Path(__file__).resolve().parents[3] / "build" / "emulated"
FOLDER = pathlib.Path(os.environ.get("DIFFUSION_EXT_EMULATED", BUILT))
NAME = "stand-in GPU"
DEVICES = 2
MEMORY = 2 << 30  # bytes that tests may take
# An H100's or H200's, but for the cache: benchmarks turn over twice as much.
PROPERTIES = {"name": NAME, "major": 9, "minor": 0, "multi_processor_count": 132,
              "shared_memory_per_block_optin": 232448, "L2_cache_size": 1 << 12,
              "total_memory": MEMORY, "clock_rate": 1_980_000}  # fmt: skip
_compile = torch.compile
SYNC_DEBUG_MODES = {"default": 0, "warn": 1, "error": 2}


def _ops():
    return torch.ops.stand_in_gpu


class Stream(torch.Stream):
    """torch.cuda.Stream"""

    def __new__(cls, device=None, priority=0):
        return super().__new__(cls, device=torch.device("cuda", index_of(device)))

    def wait_event(self, event):
        event.wait(self)

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event


class Event:
    """torch.cuda.Event, of a torch.Event, which measures no time to an object of a subclass."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.inner = torch.Event("cuda", enable_timing=enable_timing)

    def record(self, stream=None):
        self.inner.record(stream or current_stream())

    def wait(self, stream=None):
        self.inner.wait(stream or current_stream())

    def query(self):
        return self.inner.query()

    def synchronize(self):
        self.inner.synchronize()

    def elapsed_time(self, other):
        return self.inner.elapsed_time(other.inner)


class CUDAGraph:
    """torch.cuda.CUDAGraph"""

    def capture_begin(self, pool=None, capture_error_mode="global", **_):
        self._id = _ops().capture_begin()
        self.reset = weakref.finalize(self, _ops().release, self._id)
        self.reset.atexit = False

    def capture_end(self):
        _ops().capture_end(self._id)

    def replay(self):
        _ops().replay(self._id)

    def pool(self):
        return (0, 0)


def index_of(device) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def current_device() -> int:
    return _ops().device()


def set_device(device) -> None:
    _ops().set_device(index_of(device))


def exchange_device(device: int) -> int:
    before = current_device()
    if device >= 0:
        _ops().set_device(device)
    return before


def current_stream(device=None):
    return torch.accelerator.current_stream(index_of(device))


@contextlib.contextmanager
def on_stream(stream):
    """torch.cuda.stream"""
    if stream is None:
        yield
        return
    before_device, before = current_device(), current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    _ops().set_device(stream.device_index)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        _ops().set_device(before_device)


def synchronize(device=None) -> None:
    torch.accelerator.synchronize(index_of(device))


def set_sync_debug_mode(mode) -> None:
    """In the mode "error" torch.cuda.synchronize is an error too, which a GPU lets pass."""
    _ops().let_waits_be_errors(SYNC_DEBUG_MODES.get(mode, mode) == 2)


def new_storage(cls, *args, device=None, **options):
    """torch.UntypedStorage"""
    if device is None or torch.device(device).type != "cuda":
        return StorageBase.__new__(cls, *args, device=device, **options)
    return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()


def in_use(device=None) -> int:
    return _ops().bytes_in_use()


def properties(device=None):
    return types.SimpleNamespace(**PROPERTIES)


def compile_eagerly(model=None, *, mode=None, options=None, backend="inductor", **more):
    """torch.compile, which traces as ever; Inductor would compile for a GPU, and runs nothing."""
    given = more if backend == "inductor" else {"mode": mode, "options": options, **more}
    return _compile(model, backend="eager" if backend == "inductor" else backend, **given)


def install() -> None:
    """Loads the library and puts these in torch.cuda's places."""
    path = FOLDER / "stand_in.so"
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # the kernels' libraries look for its names
    cuda = torch.cuda
    torch.version.cuda = "13.0"
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": current_device,
        "set_device": set_device,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": lambda device: exchange_device(device),  # Dynamo tells them apart
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": current_stream,
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": in_use,
        "memory_reserved": in_use,
        "max_memory_allocated": in_use,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "default_generators": tuple(_ops().default_generator(i) for i in range(DEVICES)),
        "is_current_stream_capturing": lambda: _ops().is_capturing(),
        "_sleep": lambda cycles: time.sleep(cycles / 2e9),
        "CUDAGraph": CUDAGraph,
    }
    for name, stand_in in replaced.items():
        setattr(cuda, name, stand_in)
    for name in ("_lazy_init", "current_device", "device_count"):  # which it has by name
        setattr(cuda.random, name, replaced[name])
    torch.UntypedStorage.__new__ = new_storage
    torch.compile = compile_eagerly
    torch._C._host_emptyCache = lambda: None  # which torch.cuda.graph calls
    torch._C._cuda_getDevice = current_device  # and Dynamo
    cuda.graphs.is_current_stream_capturing = replaced["is_current_stream_capturing"]
