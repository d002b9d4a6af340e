"""Other runtimes that a network can be exported to: OpenVINO and ONNX Runtime.

Each takes a network and its inputs, of which it takes the shapes, and gives a callable of such
tensors, on torch's threads in float32 on the CPU. Both are extras:
pip install "diffusion_ext[onnxruntime]" or "[openvino]".
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

PACKAGES = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}


def missing(runtime: str) -> str:
    """The packages that a runtime wants and that are not here."""
    return ", ".join(p for p in PACKAGES[runtime] if not importlib.util.find_spec(p))


@functools.cache
def openvino_core():
    """OpenVINO's Core, one for the process and never given up. ImportError where there is none.

    `openvino.compile_model` makes one a call. Each gives its thread a signal stack (sigaltstack) of
    its own and, when it is destroyed, restores the one before, whether or not that one's Core still
    lives: the next signal then writes over whatever lies there by now.
    """
    import openvino

    return openvino.Core()


def _with_openvino(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16, where the processor has it
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    converted = openvino.convert_model(network, example_input=inputs)
    request = openvino_core().compile_model(converted, "CPU", settings).create_infer_request()
    lock = threading.Lock()  # a request has one output, which the next call overwrites

    def call(*inputs: Tensor) -> Tensor:
        with lock:
            results = request.infer([_array(t) for t in inputs], share_inputs=True)
            return torch.from_numpy(results[0].copy())

    return call


def _with_onnxruntime(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # By a file: one message holds 2 GB at most, and weights of more lie beside it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "network.onnx")
        torch.onnx.export(network, inputs, dynamo=True, verbose=False).save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = {name: _array(t) for name, t in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


def _array(t: Tensor):
    return t.detach().contiguous().numpy()


RUNTIMES = {"onnxruntime": _with_onnxruntime, "openvino": _with_openvino}
