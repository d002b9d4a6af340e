"""BatchNormAct beside torch's BatchNorm2d and activation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

from diffusion_ext.nn.batch_norm_act import BatchNormAct
from diffusion_ext.ops.backend import missing

OURS = "diffusion_ext::group_norm_act"


class Both(nn.Module):
    """The two modules that a BatchNormAct replaces, with its parameters and buffers."""

    def __init__(self, norm: BatchNormAct):
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict(), strict=True)

    def forward(self, x):
        return F.gelu(self.norm(x))


def pair(channels=5):
    norm = BatchNormAct(channels, act="gelu")
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm, Both(norm)


def images(shape, layout=torch.channels_last, dtype=torch.float32):
    return (3 * torch.randn(shape, dtype=dtype) + 2).contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (1, 5, 3, 7), (2, 5, 1, 1), (9, 5, 16, 16)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_training_is_the_two_modules(shape, layout):
    ours, theirs = pair()
    for _ in range(3):
        x, dy = images(shape, layout), torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [module(x) for module, x in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert results[0].is_contiguous(memory_format=layout)
        for result in results:
            result.backward(dy)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.norm.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.bias.grad, theirs.norm.bias.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in theirs.norm.named_buffers():
        torch.testing.assert_close(getattr(ours, name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cpu" in missing, reason="the kernels were not built")
def test_training_on_channels_last_is_one_kernel():
    norm, _ = pair()

    def ops(x):
        with profile() as profiled:
            norm(x)
        return {event.key for event in profiled.key_averages()}

    assert OURS in ops(images((3, 5, 8, 8)))
    assert OURS not in ops(images((3, 5, 8, 8), torch.contiguous_format))
    x = images((3, 5, 8, 8)).requires_grad_()
    y, dy = norm(x), images((3, 5, 8, 8))
    with profile() as profiled:
        torch.autograd.grad(y, x, dy)
    keys = {event.key for event in profiled.key_averages()}
    assert f"{OURS}_backward" in keys
    assert "aten::copy_" not in keys  # of gradients in another layout: it took longer than the op
    norm.eval()
    assert OURS not in ops(images((3, 5, 8, 8)))


def test_evaluation_is_the_two_modules():
    ours, theirs = pair()
    for module in (ours, theirs):
        module.train()(images((4, 5, 6, 6)))
    theirs.norm.load_state_dict(ours.state_dict())
    x = images((2, 5, 6, 6))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_float64():
    ours, theirs = (module.double() for module in pair())
    x = images((3, 5, 4, 4), dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))


def test_one_value_a_channel_is_torchs_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pair()[0](images((1, 5, 1, 1)))
