"""What people run a network with instead: OpenVINO and ONNX Runtime, as `sample` runs them too.

The extra [peers] brings both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_ext.sampling.exports import exported
from diffusion_ext.sampling.runtimes import missing

from .work import Implementation

NAMES = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}


def peers(build: Callable[[], nn.Module], device: str, **options) -> dict[str, Implementation]:
    """A row for each of them. build() is the network; the options are those of Implementation."""
    if device != "cpu":
        return {}
    return {
        name: Implementation(
            _exported(build, name), missing=missing(NAMES[name]), compiles=True, **options
        )
        for name in NAMES
    }


def _exported(build: Callable[[], nn.Module], name: str) -> Callable:
    def make(*inputs: Tensor) -> Callable:
        return exported(NAMES[name], build().eval(), inputs)

    return make
