"""The command `bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ...ops.backend import NATIVE_DTYPES
from ..page import show
from ..places import device_of
from .report import Result
from .subject import Request
from .turns import measured
from .worker import NAMES

Dtype = Literal[tuple(str(dtype).removeprefix("torch.") for dtype in NATIVE_DTYPES)]


@dataclass(frozen=True)
class Bench:
    """Measure what a model would gain on this machine: eager, torch.compile, runtimes and ours."""

    model: tyro.conf.Positional[str] = NAMES[0]
    """context-unet, ddpm-cifar10, stable-diffusion; a checkpoint or run of `train`; or a folder of
    diffusers' (a pipeline, a UNet, an autoencoder or a scheduler; its weights may be missing)"""
    batch: int = 1
    """pictures at once"""
    size: int | None = None
    """side of a picture in pixels; default what the model was made for"""
    steps: int = 25
    """of the sampler"""
    dtype: Dtype = "float32"
    """of weights and samples"""
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""
    seconds: float = 120.0
    """how long it may take, about; what is not ready in time is left out"""
    out: Path = Path("runs/bench.html")
    """the page; the figures come beside it as JSON"""
    open: bool = False
    """show the page in a browser"""

    def run(self) -> None:
        for name in ("batch", "size", "steps", "seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        device = str(device_of(self.device))
        request = Request(
            self.model, "eager", self.batch, self.size, self.steps, device, self.dtype
        )
        print(
            f"measuring {self.model} on {device}, for about {self.seconds:g} s at most", flush=True
        )
        result = Result(request, measured(request, self.seconds))
        print(result.text())
        result.write(self.out)
        print(f"page        {self.out}")
        if self.open:
            show(self.out)
