"""Which implementation serves a call: the compiled kernels ("native") or the torch reference."""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_choice

# Backend -> the torch.ops namespace of its kernels. "reference", which is torch itself, has none.
NAMESPACES = {"native": "diffusion_ext"}
CPU_CAPABILITIES = ("baseline", "neon", "avx2", "avx512")
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The folder that the package was imported from, whatever its files are links to.
PACKAGE = pathlib.Path(sys.modules[__package__.rpartition(".")[0]].__path__[0]).resolve()
OWNER = "_diffusion_ext_of"  # in torch.ops: the package whose ops are there


def build_record() -> dict[str, str]:
    """The facts that setup.py left behind; {} where nothing was built."""
    record = PACKAGE / "_build.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


def _load_cpu() -> str | None:
    """Import `_C`, which registers the ops and their CPU kernels; the reason where that fails."""
    # A second copy of the package (the hub's, beside an installed one) must not register its ops
    # beside the first one's: torch does not survive that.
    other = vars(torch.ops).get(OWNER, PACKAGE)
    if other != PACKAGE:
        return f"another copy of diffusion_ext is loaded in this process, that of {other}"
    try:
        importlib.import_module(".._C", __package__)  # of this package, whatever it is called
    except ImportError as error:
        if any(PACKAGE.glob("_C*.so")) or any(PACKAGE.glob("_C*.pyd")):
            return f"the built library does not load: {error}"
        return "the C++ library was not built"
    vars(torch.ops)[OWNER] = PACKAGE
    return None


def _load_cuda() -> str | None:
    """Load the CUDA kernels where torch has CUDA; the reason where they are not loaded."""
    if "cpu" in missing:
        return missing["cpu"]
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    libraries = [*PACKAGE.glob("_cuda*.so"), *PACKAGE.glob("_cuda*.pyd")]
    if not libraries:
        _, _, why = build_record().get("cuda", "").partition("not built: ")
        return "the CUDA library was not built" + (f": {why}" if why else "")
    built = re.match(r"nvcc (\d+)", build_record().get("cuda", ""))
    if built and built[1] != torch.version.cuda.split(".")[0]:  # each major has its own runtime
        return f"the CUDA library is of CUDA {built[1]}, torch of CUDA {torch.version.cuda}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the built library does not load: {error}"
    return None


# Device type -> why its kernels are missing. A device without an entry is served natively.
missing: dict[str, str] = {}
for _device, _load in (("cpu", _load_cpu), ("cuda", _load_cuda)):
    if (_reason := _load()) is not None:
        missing[_device] = _reason


def constant_to_compile(function: Callable) -> Callable:
    """Decorates what torch.compile shall call once, while it compiles, for a constant.

    It does what torch.compiler.assume_constant_result does. That one imports torch._dynamo, for
    which every program would wait 0.9 s, also those that compile nothing.
    """
    function._dynamo_marked_constant = True
    return function


# Index of a GPU -> whether the CUDA library was compiled for it; asked when it is first used, since
# that starts CUDA in this process.
_code: dict[int, bool] = {}


@constant_to_compile
def has_code(index: int) -> bool:
    """Whether the CUDA library, which is loaded, was compiled for the GPU `index`.

    Where it was not, the reference serves, and a warning says so once.
    """
    if index not in _code:
        _code[index] = torch.ops.diffusion_ext.has_code(index)
        if not _code[index]:
            warnings.warn(f"torch's reference serves: {why_no_code(index)}", stacklevel=2)
    return _code[index]


def why_no_code(index: int) -> str:
    """What `info` says of a GPU that the CUDA library was not compiled for."""
    major, minor = torch.cuda.get_device_capability(index)
    built = build_record().get("cuda", "").partition(":")[0]
    return (
        f"the CUDA library has no code for cuda:{index} ({torch.cuda.get_device_name(index)}, "
        f"{major}.{minor}), it was built by {built}; TORCH_CUDA_ARCH_LIST chooses at the build"
    )


def _cpu_capability() -> str:
    told = os.environ.get("DIFFUSION_EXT_CPU_CAPABILITY", "")
    if told not in ("", *CPU_CAPABILITIES):
        warnings.warn(
            f"DIFFUSION_EXT_CPU_CAPABILITY: wanted one of {CPU_CAPABILITIES}, got {told!r}; using "
            "the processor's best",
            stacklevel=2,
        )
    if "cpu" in missing:
        return "baseline"
    from .._C import cpu_capability

    return cpu_capability()


# The vector unit that our kernels on the CPU use, and whether torch's own use a better one: where
# the compiler could build ours for the least of processors only (MSVC), or where
# DIFFUSION_EXT_CPU_CAPABILITY lowers them.
CPU_CAPABILITY = _cpu_capability()
OUTDONE = CPU_CAPABILITY == "baseline" and torch.backends.cpu.get_cpu_capability().startswith("AVX")

native_devices = tuple(device for device in ("cpu", "cuda") if device not in missing)
_on_cpu, _on_cuda = ("cpu" in native_devices, "cuda" in native_devices)


def _names() -> tuple[str, ...]:
    return (*NAMESPACES, "reference")


def _backend_from_environment() -> str:
    name = os.environ.get("DIFFUSION_EXT_BACKEND", "native")
    if name not in _names():
        warnings.warn(
            f"DIFFUSION_EXT_BACKEND: wanted one of {_names()}, got {name!r}; using 'native'",
            stacklevel=2,
        )
        return "native"
    return name


_current = _backend_from_environment()
_kernels = torch.ops.diffusion_ext


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose what serves the ops inside the `with` block, for the whole process.

    Args:
        name: "native" (the default: compiled kernels, and the reference wherever no kernel serves
            a call: float64, another device, a library that is missing) or "reference" (pure torch
            always). DIFFUSION_EXT_BACKEND sets the choice that a process starts with.

    Raises: ValueError for another name.
    """
    check_choice("name", name, _names())
    return _using(name)


@contextlib.contextmanager
def _using(name: str):
    global _current, _kernels
    before = _current, _kernels
    _current, _kernels = name, getattr(torch.ops, NAMESPACES.get(name, "diffusion_ext"))
    try:
        yield
    finally:
        _current, _kernels = before


def current_backend() -> str:
    """The name chosen by `use_backend` or DIFFUSION_EXT_BACKEND."""
    return _current


def kernels():
    """The compiled ops of the current backend; the native ones where that is the reference."""
    return _kernels


def kernel(name: str):
    """One op of `kernels()`, without the search among its overloads, of which there is one: that
    took 0.5 of a small step's 6 us."""
    ops = _single[_current]
    if name not in ops:
        ops[name] = getattr(_kernels, name).default._op
    return ops[name]


_single: dict[str, dict[str, Callable]] = collections.defaultdict(dict)  # of each backend


def serves(x: Tensor) -> bool:
    """Whether a kernel serves a call on x. Forward-mode derivatives and torch.func's transforms are
    the reference's, programs that are recorded for other runtimes torch's own ops'."""
    return (  # is_cpu and is_cuda, since device.type makes a string
        _current != "reference"
        and x.dtype in NATIVE_DTYPES
        and ((x.is_cpu and _on_cpu) or (x.is_cuda and _on_cuda))
        and forward_ad._current_level < 0  # written out: a call of `transformed` takes 33 ns
        and not torch._C._are_functorch_transforms_active()
        and not recorded()
        and (x.is_cpu or has_code(x.get_device()))  # last: torch.jit.trace cannot write it down
    )


def transformed() -> bool:
    """Whether forward-mode derivatives or torch.func's transforms look at the calls."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _serves_beyond_the_cpu(x: Tensor) -> bool:
    return not x.is_cpu and serves(x)


# `serves` for an op whose bits are no promise: not on a CPU where torch's own kernels use a better
# vector unit than ours. Chosen once: a call of a call took 33 ns of each.
serves_faster = _serves_beyond_the_cpu if OUTDONE else serves


def recorded() -> bool:
    """Whether the call is being written down for what does not know our ops: torch.jit.trace, and
    so OpenVINO's conversion, or an ONNX export of either kind. Programs of torch.export run in
    torch, where our ops are known."""
    if torch._C._get_tracing_state() is not None:  # half the time of torch.jit.is_tracing
        return True
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call on these inputs."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # any(...) of a generator took twice the time
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# Op -> its fake: the outputs' shapes and dtypes, which torch.compile and opcheck ask for.
fakes: dict[str, Callable] = {}


def register_fake(name: str):
    """Decorates the fake of the op `name`."""

    def register(fake: Callable) -> Callable:
        fakes[name] = fake
        if "cpu" not in missing:
            torch.library.register_fake(f"{NAMESPACES['native']}::{name}", fake)
        return fake

    return register
