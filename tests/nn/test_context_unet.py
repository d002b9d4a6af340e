"""ContextUnet: the published layout and numbers, its options, and every error message."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn.context_unet import ResidualConvBlock

FIXTURE = Path(__file__).parents[1] / "fixtures" / "context_unet_16.npz"


@pytest.fixture(scope="module")
def oracle():
    with np.load(FIXTURE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def published(oracle):
    model = dx.nn.ContextUnet(*oracle["config"].tolist())
    state = {n.removeprefix("state/"): v for n, v in oracle.items() if n.startswith("state/")}
    model.load_state_dict(state, strict=True)
    return model.eval()


def small(**options):
    torch.manual_seed(0)
    return dx.nn.ContextUnet(3, 8, 5, 8, **options).eval()


def inputs(batch=2, model_dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=model_dtype)
    t = torch.rand(batch, generator=generator, dtype=model_dtype)
    return x, t, torch.randn(batch, 5, generator=generator, dtype=model_dtype)


def test_state_dict_layout():
    model = dx.nn.ContextUnet(in_channels=3, n_feat=64, n_cfeat=5, height=16)
    assert len(model.state_dict()) == 156
    assert sum(p.numel() for p in model.parameters()) == 1_480_771
    assert {"up0.1.weight", "out.1.bias", "out.3.weight"} <= model.state_dict().keys()


def test_matches_the_oracle_with_context(oracle, published):
    y = published(oracle["x"], oracle["t"], oracle["context"])
    torch.testing.assert_close(y.double(), oracle["y_with_context"], rtol=0, atol=1e-5)


def test_matches_the_oracle_with_one_time_and_no_context(oracle, published):
    y = published(oracle["x"], oracle["t"][:1].reshape(1, 1, 1, 1))
    torch.testing.assert_close(y.double(), oracle["y_t0_no_context"], rtol=0, atol=1e-5)


def test_matches_the_oracle_in_channels_last(oracle, published):
    x = oracle["x"].to(memory_format=torch.channels_last)
    model = dx.nn.ContextUnet(**published.configuration).eval()
    model.load_state_dict(published.state_dict())
    y = model.to(memory_format=torch.channels_last)(x, oracle["t"], oracle["context"])
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), oracle["y_with_context"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_channels_last_reaches_every_layer(norm):
    model = small(norm=norm).to(memory_format=torch.channels_last)
    maps = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.MaxPool2d, dx.nn.GroupNormAct)
    elsewhere = []

    def check(module, arguments, output):
        for tensor in (arguments[0], output):
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                elsewhere.append((module, tensor.shape, tensor.stride()))

    for module in model.modules():
        if isinstance(module, (*maps, ResidualConvBlock)):
            module.register_forward_hook(check)
    x, t, c = inputs()
    model(x.to(memory_format=torch.channels_last), t, c)
    assert not elsewhere


@pytest.mark.parametrize("height", [4, 8, 12, 20, 28])
def test_heights(height):
    model = dx.nn.ContextUnet(1, 8, 2, height).eval()
    assert model(torch.zeros(2, 1, height, height), torch.ones(2)).shape == (2, 1, height, height)


def test_pool_window_drops_the_border():
    """A window of 4 ignores the last rows of the 7x7 map at height 28; the default does not."""
    whole, cropped = dx.nn.ContextUnet(1, 8, 2, 28), dx.nn.ContextUnet(1, 8, 2, 28, pool_window=4)
    x = torch.zeros(1, 16, 7, 7)
    x[..., 4:, 4:] = 1.0
    assert cropped.to_vec(x).abs().max() == 0
    assert whole.to_vec(x).min() > 0


def test_group_norm_option_replaces_every_batch_norm():
    model = small(norm="group")
    assert not any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.GELU) for m in convolutions(model))
    block = model.down1.model[0]
    x = torch.randn(2, 8, 8, 8)
    expected = F.gelu(F.group_norm(block.conv1[0](x), 8, block.conv1[1].weight))
    torch.testing.assert_close(block.conv1(x), expected)


def convolutions(model):
    return [m for b in model.modules() if isinstance(b, ResidualConvBlock) for m in b.modules()]


def test_shortcuts():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    block = ResidualConvBlock(3, 8, is_res=True).eval()
    x1 = block.conv1(x)
    x2 = block.conv2(x1)
    torch.testing.assert_close(block(x), (x1 + x2) / 1.414)
    block.shortcut = "zero"
    torch.testing.assert_close(block(x), x2 / 1.414)
    same = ResidualConvBlock(8, 8, is_res=True).eval()
    torch.testing.assert_close(same(x2), (x2 + same.conv2(same.conv1(x2))) / 1.414)


def test_random_shortcut_is_a_new_conv_each_time_and_zero_on_average():
    block = ResidualConvBlock(3, 8, is_res=True, shortcut="random").eval()
    x = torch.randn(1, 3, 4, 4)
    torch.manual_seed(0)
    draws = torch.stack([block(x) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    # nn.Conv2d draws weights and bias uniformly in ±1/√3 here: each has the variance 1/9.
    expected = ((x**2).sum(1, keepdim=True) + 1) / 9 / 1.414**2
    torch.testing.assert_close(draws.var(0), expected.expand(1, 8, 4, 4), rtol=0.25, atol=0)
    block.shortcut = "zero"
    torch.testing.assert_close(draws.mean(0), block(x), rtol=0, atol=0.1)


def test_context_none_is_zeros_and_times_broadcast():
    model = small()
    x, _, _ = inputs()
    t = torch.tensor([0.25])
    expected = model(x, t.expand(2), torch.zeros(2, 5))
    for time in (t, t.reshape(()), t.reshape(1, 1, 1, 1)):
        torch.testing.assert_close(model(x, time), expected)


def test_time_and_context_matter():
    model = small(norm="group")
    x, t, c = inputs()
    assert (model(x, t, c) - model(x, t)).abs().max() > 1e-3
    assert (model(x, t, c) - model(x, t / 2, c)).abs().max() > 1e-3


def test_empty_batch():
    x, t, c = inputs(batch=0)
    assert small(norm="group")(x, t, c).shape == (0, 3, 8, 8)


def test_configuration_builds_the_model_again():
    model = small(norm="group", shortcut="zero")
    again = dx.nn.ContextUnet(**model.configuration)
    assert again.configuration == model.configuration
    again.load_state_dict(model.state_dict())
    assert (model.in_channels, model.n_feat, model.n_cfeat, model.height) == (3, 8, 5, 8)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_reach_every_parameter(norm):
    model = small(norm=norm).train()
    model(*inputs()).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a BatchNorm is subtracted again with the mean, and has no gradient but rounding.
    assert not [n for n in missing if not n.endswith("0.bias")]


def test_float64_reference_agrees():
    model, (x, t, c) = small(norm="group"), inputs()
    y = model(x, t, c)
    y64 = model.double()(x.double(), t.double(), c.double())
    torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_compiles_whole(norm):
    model, (x, t, c) = small(norm=norm), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, c), model(x, t, c))


def test_random_shortcut_compiles_whole():
    model, (x, t, c) = small(shortcut="random"), inputs()
    assert torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, c).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "height: wanted a positive multiple of 4, got 30"),
        ({"height": 0}, "height: wanted a positive multiple of 4, got 0"),
        ({"n_feat": 12}, "n_feat: wanted a positive multiple of 8, got 12"),
        ({"in_channels": 0}, "in_channels: wanted at least 1, got 0"),
        ({"n_cfeat": -1}, "n_cfeat: wanted at least 1, got -1"),
        ({"norm": "layer"}, r"norm: wanted one of \('batch', 'group'\), got 'layer'"),
        ({"shortcut": "conv"}, r"shortcut: wanted one of \('random', .*, got 'conv'"),
        ({"pool_window": 3}, "pool_window: wanted a window that pools the 7x7 map to 1x1, got 3"),
        ({"pool_window": 8}, "pool_window: wanted a window that pools the 7x7 map to 1x1, got 8"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        dx.nn.ContextUnet(**({"in_channels": 1, "height": 28} | options))


def test_sizes_must_be_ints():
    with pytest.raises(TypeError, match="height: wanted an int, got str"):
        dx.nn.ContextUnet(1, height="28")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 1, 8, 8)},
            ValueError,
            r"x: wanted shape \[B, 3, 8, 8\], got \[2, 1",
        ),
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x: wanted shape .*, got \[3, 8, 8\]"),
        ({"x": torch.zeros(2, 3, 8, 12)}, ValueError, r"x: wanted .*, got \[2, 3, 8, 12\]"),
        ({"x": torch.zeros(2, 3, 8, 8).long()}, TypeError, "x: wanted a floating .*int64"),
        (
            {"t": torch.ones(2).long()},
            TypeError,
            "t: wanted a floating point tensor .timestep / T., .*int64",
        ),
        ({"t": torch.ones(3)}, ValueError, r"t: wanted shape \[2\] or one value, got \[3\]"),
        ({"c": torch.ones(2, 4)}, ValueError, r"c: wanted .* floats \[2, 5\], got .* \[2, 4\]"),
        ({"c": torch.ones(1, 5)}, ValueError, r"c: wanted .* floats \[2, 5\], got .* \[1, 5\]"),
        ({"c": torch.ones(2)}, ValueError, r"c: wanted class labels, int64 \[2\], .* c\.long\(\)"),
        ({"c": torch.ones(2).int()}, TypeError, r"c: wanted .*int32 \[2\]; c\.long\(\)"),
        ({"c": torch.ones(3).long()}, ValueError, r"c: wanted class labels, .*int64 \[3\]$"),
        ({"c": torch.ones(2, 5).long()}, TypeError, r"c: wanted class labels, .* \[2, 5\]"),
        ({"c": torch.tensor([0, 5])}, ValueError, "c: wanted values from 0 to 4, got 0 to 5"),
        ({"c": [0, 1]}, TypeError, r"c: wanted class labels, .* got \[0, 1\]"),
    ],
)
def test_bad_input(change, error, message):
    x, t, c = inputs()
    with pytest.raises(error, match=message):
        small()(**({"x": x, "t": t, "c": c} | change))


def test_converted_batch_norms_keep_their_activations():
    model = dx.nn.ContextUnet(3, 16, 5, 16).eval()
    x, t, c = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 5)
    expected = model(x, t, c)
    keys = list(model.state_dict())
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x, t, c), expected, rtol=1e-4, atol=1e-4)
    optimized = dx.optimize_for_sampling(model)
    torch.testing.assert_close(optimized(x, t, c), expected, rtol=1e-4, atol=1e-4)
