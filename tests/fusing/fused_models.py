"""What the tests of fuse share: two models side by side, and which ops they call."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_ext as dx


class Ops(TorchDispatchMode):
    """How often each op is dispatched: `count["group_norm_act"]`, `count["silu"]` ..."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def ops_of(call) -> Counter:
    with torch.no_grad(), Ops() as ops:
        call()
    return ops.count


def fused_copy(model):
    copied = copy.deepcopy(model)
    return copied, dx.fuse(copied)


def rows(*shape) -> torch.Tensor:
    """Rows [*shape, 48] of a linear layer's inputs."""
    return torch.randn(*(shape or (2, 9)), 48)


def first_tensor(output) -> torch.Tensor:
    """The tensor in what a model returns: itself, or the first field of diffusers' outputs."""
    return output if isinstance(output, torch.Tensor) else output[0]


def results(model, inputs) -> dict[str, torch.Tensor]:
    """The output of model, and the gradient of every input and parameter of a loss on it."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    model.zero_grad()
    y = first_tensor(model(*inputs))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y.float() * weights).sum().backward()
    named = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    named |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    return {"output": y.detach()} | {n: g for n, g in named.items() if g is not None}


def assert_same_results(actual: dict, expected: dict, tolerance: float) -> None:
    """Equal to tolerance of the largest output, or gradient: single ones may vanish altogether."""
    assert actual.keys() == expected.keys()
    largest = max(t.abs().max() for n, t in expected.items() if n != "output")
    for name, tensor in expected.items():
        scale = tensor.abs().max() if name == "output" else largest
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        error = (actual[name] - tensor).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


def identity_of(model) -> list:
    """The state dict, and the very objects that hold it."""
    return [(name, id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()] + [
        *model.state_dict()
    ]


def vary_gently(model):
    """Norms' parameters away from 1 and 0, the activations still of the order of 1."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


class GEGLU(nn.Module):
    """As CompVis and many others write it."""

    def __init__(self, channels, out_features):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_features)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


def geglu(channels=48):
    torch.manual_seed(0)
    return GEGLU(channels, 24)
