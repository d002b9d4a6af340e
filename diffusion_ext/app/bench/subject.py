"""What `bench` times: the parts of making a picture, each run in one of several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...sampling.runtimes import missing

# way -> what it is called where people read
WAYS = {
    "eager": "eager", "compile": "torch.compile", "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime", "ours": "diffusion_ext",
}  # fmt: skip
RUNTIMES = ("openvino", "onnxruntime")  # the ways to which a network is exported
RANDOM_WEIGHTS = "The weights are random; the time does not depend on them."


@dataclass(frozen=True)
class Request:
    """What is to be timed, in one of the ways. It travels to the way's own process.

    Attributes:
        model: a name in `BUILT_IN`, a checkpoint of ours, or a folder of diffusers'.
        way: of `WAYS`. batch: pictures at once.
        size: side of a picture in pixels; None is what the model was made for.
        steps: of the sampler. device, dtype: torch's names.
    """

    model: str
    way: str
    batch: int = 1
    size: int | None = None
    steps: int = 25
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Part:
    """One part of making a batch of pictures.

    Attributes:
        name: such as "network". uses: how many a batch of pictures needs.
        call: runs it and returns what it computed. per_call: uses that one call has.
    """

    name: str
    uses: int
    call: Callable[[], Tensor]
    per_call: int = 1


@dataclass(frozen=True)
class Subject:
    """A model that is to be timed in one way.

    Attributes:
        title: such as "UNet2DModel". shape: of the batch of pictures, [B, C, H, W].
        parts: the same in each way. advice: lines of Python that give what was timed.
        notes: what a reader has to know, such as that the weights are random.
    """

    title: str
    shape: tuple[int, ...]
    parts: list[Part]
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def refusal(request: Request, way: str) -> str:
    """Why a way cannot be taken at all; "" where it may be."""
    if way not in RUNTIMES:
        return ""
    if (request.device, request.dtype) != ("cpu", "float32"):
        return f"wants float32 on a CPU, not {request.dtype} on {request.device}"
    return f'not installed: pip install "diffusion_ext[{way}]" brings it' if missing(way) else ""


def drawn(shape: tuple[int, ...], request: Request, seed: int = 0) -> Tensor:
    """Normals, the same in each way's process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(request.device, request.torch_dtype)
