"""One piece of work and every implementation of it: what they are given, must give, and must move.

The pytest suite and the GPU check time the same works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from harness import assert_close, lay
from torch import Tensor

import diffusion_ext as dx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EAGER_FACTOR = 16  # a formula of torch's rounds after every operation


@dataclass(frozen=True)
class Case:
    """The tensors of a work. scale: what the GPU's targets call this size."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"
    scale: str = ""

    def draw(self, shape=None) -> Tensor:
        """Normals of this dtype and layout."""
        of = {"dtype": DTYPES[self.dtype], "device": self.device}
        return lay(torch.randn(shape or self.shape, **of), self.layout)

    def seeds(self) -> Tensor:
        return torch.arange(self.shape[0], device=self.device)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Implementation:
    """One way to do a work.

    Attributes:
        make: make(*inputs) is a callable of the same inputs; what it does is not timed.
        noise: whose noise a random work gets: "seeds" (diffusion_ext's contract), "torch" (the
            default generator's next normals) or "own", of which only the moments can be checked.
        factor: of the tolerance of the dtype.
        around: what it runs within.
        compiles: its first call takes torch.compile's seconds.
        missing: what it wants that is not here.
        gives_x: its result is x, for comparison, and not the work's.
    """

    make: Callable[..., Callable]
    noise: str = "torch"
    factor: float = 1
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext
    compiles: bool = False
    missing: str = ""
    gives_x: bool = False


def formula(call: Callable, **options) -> Implementation:
    """Eager torch."""
    return Implementation(lambda *_: call, **{"factor": EAGER_FACTOR, **options})


def compiled(call: Callable, **options) -> Implementation:
    return Implementation(
        lambda *_: compile_anew(call), **{"factor": EAGER_FACTOR, "compiles": True, **options}
    )


def compile_anew(call: Callable) -> Callable:
    """torch.compile keeps what it compiled by code object, so this gives it one of its own."""

    def own(*inputs):
        return call(*inputs)

    own.__code__ = own.__code__.replace()
    return torch.compile(own, fullgraph=True, dynamic=False)


def ours(call: Callable) -> dict[str, Implementation]:
    """diffusion_ext with its torch reference, and with its kernels."""
    kernels = Implementation(lambda *_: call, noise="seeds")
    return {"reference": referring(kernels), "ours": kernels}


def referring(ours: Implementation) -> Implementation:
    """The same with the torch reference in place of the kernels."""

    @contextlib.contextmanager
    def around():
        with ours.around(), dx.use_backend("reference"):
            yield

    return dataclasses.replace(ours, around=around, factor=max(ours.factor, EAGER_FACTOR))


def copy_of_x() -> Implementation:
    """y.copy_(x), of the first input: what memory allows."""

    def make(x, *_):
        y, x = torch.empty_like(x.detach()), x.detach()
        return lambda *_: y.copy_(x)

    return Implementation(make, gives_x=True)


def in_float32(call: Callable) -> Implementation:
    """A half-precision work in float32, its inputs converted beforehand."""

    def make(*inputs):
        wide = [t.float() if t.is_floating_point() else t for t in inputs]
        return lambda *_: call(*wide)

    return Implementation(make, noise="own", factor=EAGER_FACTOR)


@dataclass(frozen=True, eq=False)
class Work:
    """A piece of work: a group of rows in the results.

    Attributes:
        op, variant: what it is.
        case: on which tensors.
        inputs: makes the arguments of every implementation; the first is x.
        implementations: by name; "ours" is what the ratios are about.
        exact: exact(*inputs) is the result in float64 for floating point inputs in float64. That of
            a random work takes draw=None too: where given, draw(x) are its normals, not the seeds'.
        passes: tensors of x's size that have to be read or written. eager_passes: those of the
            GPU check's baseline, where they are known. weights: bytes to be read beside them.
        baseline: the implementation that the ratios are to.
        random: it draws noise. backward: its further results are gradients.
        apart: memory has no room for more than two implementations at once: see apart.py.
    """

    op: str
    variant: str
    case: Case
    inputs: Callable[[], tuple]
    implementations: dict[str, Implementation]
    exact: Callable
    passes: int
    eager_passes: int | None = None
    weights: int = 0
    baseline: str = "eager"
    random: bool = False
    backward: bool = False
    apart: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, {self.variant}, {self.case}"

    @property
    def dtype(self) -> str:
        return self.case.dtype

    @property
    def bytes(self) -> int:
        """That have to be moved."""
        return self.passes * self.case.bytes + self.weights


def outputs(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


class Check:
    """Holds the implementations of a work to its float64 results, each computed once."""

    def __init__(self, work: Work, inputs: tuple, exact: tuple[Tensor, ...] | None = None):
        """Args: exact: the results of a work without noise, where they are known."""
        self.work, self.inputs = work, inputs
        self._known = {} if exact is None else {None: exact}

    def error_of(self, implementation: Implementation, call: Callable) -> float | None:
        """The largest error of call(*inputs); of noise of its own only the moments are known.

        Raises: AssertionError where it is too large.
        """
        torch.manual_seed(0)
        results = [t.detach() for t in outputs(call(*self.inputs))]
        if implementation.gives_x:
            assert torch.equal(results[0], self.inputs[0]), "not a copy"
            return 0.0
        if self.work.random and implementation.noise == "own":
            return self._check_moments(results)
        noise = implementation.noise if self.work.random else None
        exact = self.exact(noise)
        errors = []
        with results[0].device:
            for i, (result, wanted) in enumerate(zip(results, exact, strict=True)):
                factor = implementation.factor * (4 if i and self.work.backward else 1)
                errors.append(assert_close(result, wanted, factor=factor))
        return max(errors)

    def exact(self, noise: str | None = None) -> tuple[Tensor, ...]:
        """In float64. Args: noise: whose, of a random work."""
        if noise not in self._known:
            inputs = [t.double() if t.is_floating_point() else t for t in self.inputs]
            dtype = DTYPES[self.work.case.dtype]
            draws = {
                "torch": lambda x: torch.randn_like(x, dtype=dtype).double(),
                "zeros": torch.zeros_like,
                "ones": torch.ones_like,
            }
            draw = {"draw": draws[noise]} if noise in draws else {}
            torch.manual_seed(0)
            exact = outputs(self.work.exact(*inputs, **draw))
            self._known[noise] = tuple(t.detach() for t in exact)
        return self._known[noise]

    def _check_moments(self, results) -> None:
        """Results that are affine in their noise: it has mean 0 and standard deviation 1."""
        for result, zero, one in zip(results, self.exact("zeros"), self.exact("ones"), strict=True):
            z = (result.double() - zero) / (one - zero)
            limit = 0.01 + 6 / math.sqrt(z.numel())
            mean, deviation = z.mean().item(), z.std().item()
            assert abs(mean) < limit, f"noise of mean {mean:.4f}"
            assert abs(deviation - 1) < limit, f"noise of standard deviation {deviation:.4f}"
