"""A GPU that the CUDA library was not compiled for: the reference serves, and `info` says why."""

import types

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.ops import backend

WHY = (
    r"the CUDA library has no code for cuda:1 \(An old GPU, 7\.0\), it was built by nvcc 13\.0 for "
    r"9\.0; TORCH_CUDA_ARCH_LIST chooses"
)


@pytest.fixture
def two_gpus(monkeypatch):
    """As if the CUDA library were loaded, with code for the first of two GPUs."""
    asked = []

    def has_code(index):
        asked.append(index)
        return index == 0

    monkeypatch.setattr(torch.ops.diffusion_ext, "has_code", has_code, raising=False)
    monkeypatch.setattr(backend, "_code", {})
    monkeypatch.setattr(backend, "_on_cuda", True)
    monkeypatch.delitem(backend.missing, "cuda", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "An old GPU")
    monkeypatch.setattr(backend, "build_record", lambda: {"cuda": "nvcc 13.0 for 9.0: -O3"})
    return asked


def on_gpu(index):
    """What `serves` asks of a tensor."""
    facts = {"dtype": torch.float32, "is_cpu": False, "is_cuda": True}
    return types.SimpleNamespace(**facts, get_device=lambda: index)


def test_the_reference_serves(two_gpus):
    assert backend.serves(on_gpu(0))
    with pytest.warns(UserWarning, match=WHY):
        assert not backend.serves(on_gpu(1))
    assert not backend.serves(on_gpu(1))  # said once, asked once
    assert two_gpus == [0, 1]


@pytest.mark.filterwarnings("ignore:torch's reference serves")
def test_info_says_why(two_gpus, monkeypatch):
    cuda = dx.info().backends["perturb"]["cuda"]
    assert cuda.startswith("native; reference: the CUDA library has no code for cuda:1")
    monkeypatch.setattr(backend, "_code", {0: False, 1: False})
    assert dx.info().backends["perturb"]["cuda"].startswith("reference: the CUDA library has no")
    monkeypatch.setattr(backend, "_code", {0: True, 1: True})
    assert dx.info().backends["perturb"]["cuda"] == "native"


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:torch's reference serves")
@pytest.mark.parametrize("has", [True, False])
def test_torch_compile_takes_the_answer_into_its_graph(two_gpus, monkeypatch, has):
    """The question itself cannot be traced."""
    ask = torch.compiler.disable(lambda index: has)
    monkeypatch.setattr(torch.ops.diffusion_ext, "has_code", ask, raising=False)
    x = torch.ones(2)

    def step(x):
        return x + 1 if backend.has_code(x.get_device()) else x - 1

    torch.compiler.reset()  # a graph keeps the answer that it was made with
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x + 1 if has else x - 1)
    assert backend._code == {x.get_device(): has}
