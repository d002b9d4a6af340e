"""optimize_for_sampling: the model's outputs, whatever its options, and the model as it was."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn import convolutions, optimized
from diffusion_ext.nn.convolutions import Conv3x3, OnednnConv3x3, Unpool
from diffusion_ext.ops import measuring
from diffusion_ext.ops.conv2d import TIMED

FORMATS = [torch.contiguous_format, torch.channels_last]
# Of the largest output.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}


def trained(in_channels=3, n_feat=16, n_cfeat=5, height=16, **options):
    """A network whose BatchNorms have seen something."""
    torch.manual_seed(0)
    model = dx.nn.ContextUnet(in_channels, n_feat, n_cfeat, height, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def inputs(model, batch=3, context=True):
    x = torch.randn(batch, model.in_channels, model.height, model.height)
    return x, torch.rand(batch), torch.randn(batch, model.n_cfeat) if context else None


def assert_near(ours, expected, dtype=torch.float32):
    assert ours.dtype == expected.dtype
    atol = TOLERANCES[dtype] * expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("height", [16, 28])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [True, False])
def test_float32(memory_format, norm, height, batch, context):
    model = trained(height=height, norm=norm)
    ours = dx.optimize_for_sampling(model, memory_format=memory_format)
    arguments = inputs(model, batch, context)
    assert_near(ours(*arguments), model(*arguments))


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(memory_format, norm, dtype):
    model = trained(norm=norm)
    x, t, c = inputs(model)
    if dtype == torch.float64:
        model, x, t, c = model.double(), x.double(), t.double(), c.double()
    ours = dx.optimize_for_sampling(model, dtype=dtype, memory_format=memory_format)
    assert_near(ours(x, t, c), model(x, t, c), dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 16},
        {"shortcut": "zero"},
        {"shortcut": "random"},
        {"height": 28, "pool_window": 4},
        {"height": 4, "n_feat": 8},
    ],
    ids=str,
)
def test_options(options):
    model = trained(**options)
    ours = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
    arguments, results = inputs(model), []
    for network in (ours, model):
        torch.manual_seed(1)  # of the random shortcut
        results.append(network(*arguments))
    assert_near(*results)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_time_any_batch_and_its_memory_format(memory_format):
    model = trained()
    ours = dx.optimize_for_sampling(model, batch=4, memory_format=memory_format)
    x, t, c = inputs(model, batch=7)
    for time in (t[:1], t[:1].reshape(1, 1, 1, 1), t[0]):
        assert_near(ours(x, time, c), model(x, time, c))
    for layout in FORMATS:
        laid = x.contiguous(memory_format=layout)
        assert ours(laid, t, c).stride() == laid.stride()
    assert ours(x[:0], t[:0], c[:0]).shape == x[:0].shape


@torch.no_grad()
def test_without_onednn(monkeypatch):
    model = trained()
    arguments = inputs(model)
    options = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}
    packed = dx.optimize_for_sampling(model, **options)
    has_onednn = OnednnConv3x3.serves(packed.init_conv.conv1.weight)
    assert (packed.init_conv.conv1.onednn is not None) == has_onednn
    monkeypatch.setattr(OnednnConv3x3, "serves", lambda weight: False)
    plain = dx.optimize_for_sampling(model, **options)
    assert plain.init_conv.conv1.onednn is None
    assert_near(plain(*arguments), packed(*arguments), torch.bfloat16)


def filters_of(network):
    """Those that are laid out, of each convolution."""
    packed = [m.packed for m in network.modules() if isinstance(m, (Conv3x3, Unpool))]
    return [[f for f in (p.winograd, p.direct) if f is not None] for p in packed]


@torch.no_grad()
@pytest.mark.skipif(not TIMED, reason="no kernel of ours")
def test_our_convolutions_serve_where_they_can():
    model = trained()
    arguments = inputs(model)
    ours = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
    expected = ours(*arguments)
    assert all(len(filters) == 1 for filters in filters_of(ours))
    with dx.use_backend("reference"):
        assert_near(ours(*arguments), expected)
        theirs = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
        assert_near(theirs(*arguments), expected)
    assert not any(filters_of(theirs))


@torch.no_grad()
@pytest.mark.skipif(not TIMED, reason="no kernel of ours")
def test_a_pickle_has_no_filters():
    """They lie as this processor wants them."""
    model = trained()
    ours = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
    arguments = inputs(model)
    expected = ours(*arguments)
    loaded = pickle.loads(pickle.dumps(ours))
    assert any(filters_of(ours))
    assert not any(filters_of(loaded))
    assert torch.equal(loaded(*arguments), expected)


@torch.no_grad()
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("channels", [(3, 8), (16, 16), (8, 1)])
def test_a_convolution_with_what_is_beside_it(gelu, channels):
    weight, bias = torch.randn(channels[1], channels[0], 3, 3), torch.randn(channels[1])
    ours = Conv3x3(weight, bias, gelu, torch.channels_last, batch=2, side=9)
    for batch, side in ((2, 9), (5, 4), (1, 1)):
        x = torch.randn(batch, channels[0], side, side)
        expected = F.conv2d(x, weight, bias, padding=1)
        expected = F.gelu(expected) if gelu else expected
        torch.testing.assert_close(ours(x), expected)
        parts = x[:, :1], x[:, 1:]
        residual = torch.randn_like(expected)
        torch.testing.assert_close(ours(*parts, residual), expected + residual)


@torch.no_grad()
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("side", "size"), [(2, 3), (4, 1)])
def test_unpool(layout, side, size):
    conv = torch.nn.ConvTranspose2d(8, 4, side, side)
    x = torch.randn(3, 8, size, size).contiguous(memory_format=layout)
    ours = Unpool(conv, layout, torch.float32)
    for result in (ours(x), ours(x[:, :5], x[:, 5:])):
        torch.testing.assert_close(result, conv(x))
        assert result.is_contiguous(memory_format=layout)


def test_the_model_is_left_as_it_was():
    model = trained().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ours = dx.optimize_for_sampling(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not ours.training
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_copy_stays_as_it_was_made(norm):
    model = trained(norm=norm)
    ours = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
    arguments = inputs(model)
    before, twin = ours(*arguments), copy.deepcopy(ours)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(ours(*arguments), before)
    assert torch.equal(twin(*arguments), before)
    for change in (ours.double, lambda: ours.to("meta"), lambda: ours.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"an optimized copy keeps its .*original"):
            change()
    assert torch.equal(ours(*arguments), before)


def test_no_gradients_and_inference_mode():
    model = trained()
    with torch.inference_mode():
        ours = dx.optimize_for_sampling(model, memory_format=torch.channels_last)
    x, t, c = inputs(model)
    y = ours(x.requires_grad_(), t, c)
    assert not y.requires_grad
    assert not any(p.requires_grad for p in ours.parameters())
    with torch.inference_mode():
        assert torch.equal(ours(x, t, c), y)


@pytest.mark.parametrize(
    ("seconds", "faster"), [((1.0, 2.0), FORMATS[0]), ((2.0, 1.0), FORMATS[1])]
)
def test_the_faster_memory_format_is_kept_and_remembered(monkeypatch, seconds, faster):
    def timed(forward, device):
        network, x = forward.func, forward.args[0]
        assert len(x) == 5
        assert x.is_contiguous(memory_format=network.memory_format)
        assert device.type == "cpu"
        clock.append(network)
        return seconds[FORMATS.index(network.memory_format)]

    clock = []
    monkeypatch.setattr(measuring, "seconds", timed)
    monkeypatch.setattr(measuring, "waited", lambda: 0.0)
    monkeypatch.setattr(optimized, "TIMED", True)  # else there is a third way
    model = trained()
    for _ in range(2):
        assert dx.optimize_for_sampling(model, batch=5).memory_format == faster
    assert len(set(clock)) == 2  # the second call took what the first one had measured
    (choice,) = dx.info().choices
    assert (choice.of, choice.taken) == (
        "optimize_for_sampling, ContextUnet, batch 5, torch.float32",
        str(faster),
    )
    monkeypatch.setattr(measuring, "seconds", lambda *_: 1.0)
    assert dx.optimize_for_sampling(model, batch=6).memory_format == FORMATS[0]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_sampling(guidance_scale, memory_format):
    model, table = trained(), dx.ddim(dx.NoiseSchedule.linear(100), 6)
    options = {"context": torch.tensor([0, 4, 2]), "guidance_scale": guidance_scale}
    options |= {"seeds": 3, "progress": False}
    ours = dx.optimize_for_sampling(model, batch=6, memory_format=memory_format)
    images = dx.sample(ours, (3, 3, 16, 16), table, **options).images
    assert_near(images, dx.sample(model, (3, 3, 16, 16), table, **options).images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model: wanted a ContextUnet, got Linear"),
        ({"batch": 0}, ValueError, "batch: wanted at least 1, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype: wanted float16, .*, got torch.int8"),
        ({"memory_format": "NHWC"}, ValueError, "memory_format: wanted one of .* got 'NHWC'"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        dx.optimize_for_sampling(**({"model": trained(height=4)} | change))


def test_bad_calls_are_the_models():
    ours = dx.optimize_for_sampling(trained())
    with pytest.raises(ValueError, match=r"x: wanted shape \[B, 3, 16, 16\]"):
        ours(torch.zeros(1, 3, 8, 8), torch.ones(1))


def test_nothing_is_left_of_the_layers_that_were_folded():
    ours = dx.optimize_for_sampling(trained())
    kinds = {type(m) for m in ours.modules()}
    assert not kinds & {torch.nn.BatchNorm2d, torch.nn.Conv2d, torch.nn.ConvTranspose2d}
    assert convolutions.Conv3x3 in kinds
