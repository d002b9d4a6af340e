"""What people run a network with instead: OpenVINO and ONNX Runtime, float32, on torch's threads.

The extra [peers] brings both. Each takes a network and its inputs, which it is exported for, and
gives a callable of torch tensors.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .work import Implementation

NAMES = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}  # -> the package


def with_openvino(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    import openvino

    model = openvino.convert_model(network, example_input=inputs)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16, where the processor has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()

    def call(*inputs: Tensor) -> Tensor:
        results = request.infer([t.numpy() for t in inputs], share_inputs=True)
        return torch.from_numpy(results[0].copy())

    return call


def with_onnxruntime(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(network, inputs, dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


RUNTIMES = {"OpenVINO": with_openvino, "ONNX Runtime": with_onnxruntime}


def peers(build: Callable[[], nn.Module], device: str, **options) -> dict[str, Implementation]:
    """A row for each of them. build() is the network; the options are those of Implementation."""
    if device != "cpu":
        return {}
    return {
        name: Implementation(
            _exported(build, name), missing=_missing(name), compiles=True, **options
        )
        for name in NAMES
    }


def _exported(build: Callable[[], nn.Module], name: str) -> Callable:
    def make(*inputs: Tensor) -> Callable:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            return RUNTIMES[name](build().eval(), inputs)

    return make


def _missing(name: str) -> str:
    wanted = [NAMES[name]] + (["onnxscript"] if name == "ONNX Runtime" else [])
    return ", ".join(package for package in wanted if not importlib.util.find_spec(package))
