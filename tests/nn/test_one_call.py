"""An optimized ContextUnet in one call: the outputs of its layers, and when it does not serve."""

import copy
import pickle

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.nn.optimized import OptimizedContextUnet
from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.conv2d import VECTORISED

pytestmark = pytest.mark.skipif(not VECTORISED, reason="no kernel of ours")


def optimized(batch=2, **options):
    torch.manual_seed(0)
    options = {"in_channels": 3, "n_feat": 16, "n_cfeat": 5, "height": 16} | options
    model = dx.nn.ContextUnet(**options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    model.eval()
    with torch.no_grad():
        return OptimizedContextUnet(model, batch, torch.float32, torch.channels_last, ours=True)


def inputs(network, batch=2, context=True):
    x = torch.randn(batch, network.in_channels, network.height, network.height)
    x = x.to(memory_format=torch.channels_last)
    return x, torch.rand(batch), torch.randn(batch, network.n_cfeat) if context else None


def by_layers(network, *arguments):
    possible, network.one_call.possible = network.one_call.possible, False
    try:
        return network(*arguments)
    finally:
        network.one_call.possible = possible


def calls(network, *arguments) -> bool:
    """Whether it was one call."""
    with torch.profiler.profile() as profile:
        network(*arguments)
    return any("context_unet" in event.key for event in profile.key_averages())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_channels": 16},
        {"in_channels": 1, "n_feat": 8},
        {"shortcut": "zero"},
        {"height": 28},
        {"height": 28, "pool_window": 4},
        {"height": 4},
        {"n_feat": 40, "n_cfeat": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [True, False])
def test_is_what_the_layers_compute(options, batch, context):
    network = optimized(**options)
    arguments = inputs(network, batch, context)
    assert calls(network, *arguments)
    expected = by_layers(network, *arguments)
    torch.testing.assert_close(network(*arguments), expected, rtol=0, atol=2e-6)
    one_time = arguments[0], arguments[1][:1], arguments[2]
    torch.testing.assert_close(network(*one_time), by_layers(network, *one_time), rtol=0, atol=2e-6)


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    network, threads = optimized(), torch.get_num_threads()
    x, t, c = inputs(network, 5)
    expected = network(x, t, c)
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert torch.equal(network(x, t, c), expected)
            assert torch.equal(network(x[:1], t[:1], c[:1]), expected[:1])
    finally:
        torch.set_num_threads(threads)


def test_a_nan_stays():
    network = optimized()
    arguments = inputs(network)
    arguments[0][0, 1, 5, 5] = torch.nan
    assert network(*arguments)[0].isnan().all()  # GroupNorm spreads it over the picture
    assert not network(*arguments)[1].isnan().any()


@pytest.mark.parametrize(
    "options", [{"norm": "group"}, {"shortcut": "random"}, {"batch": 4}], ids=str
)
def test_serves_by_its_options(options):
    network = optimized(**options)
    assert calls(network, *inputs(network)) == ("batch" in options)


def test_whoever_watches_a_layer_sees_it():
    network, seen = optimized(), []
    arguments = inputs(network)
    expected = network(*arguments)
    handle = network.up1.register_forward_hook(lambda *_: seen.append("up1"))
    torch.testing.assert_close(network(*arguments), expected, rtol=0, atol=2e-6)
    assert seen == ["up1"]
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("all"))
    network(*arguments)
    handle.remove()
    assert len(seen) > 20
    count = len(seen)
    network(*arguments)
    assert len(seen) == count


def test_other_backends_and_other_layouts():
    network = optimized()
    arguments = inputs(network)
    expected = network(*arguments)
    with dx.use_backend("reference"):
        assert not calls(network, *arguments)
        torch.testing.assert_close(network(*arguments), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # is not for a copy of one dtype
        assert torch.equal(network(*arguments), expected)
    contiguous = arguments[0].contiguous(), *arguments[1:]
    y = network(*contiguous)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    assert network(arguments[0][:0], arguments[1][:0], arguments[2][:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies(copied):
    network = optimized()
    arguments = inputs(network)
    expected = network(*arguments)
    twin = copied(network)
    del network
    assert torch.equal(twin(*arguments), expected)
    assert calls(twin, *arguments)
    assert {id(m) for m in twin.one_call.modules} == {id(m) for m in twin.modules()}


@pytest.mark.parametrize("copied", [lambda n: n, copy.deepcopy])
@pytest.mark.parametrize("run", [lambda n, *a: n(*a), by_layers])
def test_weights_that_change_in_place_are_noticed(copied, run):
    network = optimized()
    arguments = inputs(network)
    run(network, *arguments)  # lays out
    network = copied(network)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight[0].mul_(0.5 if "embed" in name else -1)
    y = run(network, *arguments)
    with dx.use_backend("reference"):
        torch.testing.assert_close(y, network(*arguments), rtol=0, atol=1e-5 * y.abs().max())


# --- what the kernel refuses ----------------------------------------------------------------------


def call_of(network, batch=2):
    """The arguments of the op."""
    arguments = inputs(network, batch)
    network(*arguments)
    (shift1, shift2), (scale1, scale2) = network.prepare(*arguments[1:])
    rows = {"scale1": scale1, "shift1": shift1, "scale2": scale2, "shift2": shift2}
    layers = dict(zip(("filters", "biases", "norms"), network.one_call.layers, strict=True))
    how = {"groups": 8, "eps": 1e-5, "shortcut": 2, "window": 4}
    return {"x": arguments[0], **rows, **layers, **how}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 10, 10)}, r"x: wanted shape \[B, C, H, H\], H a multiple of 4"),
        ({"x": torch.zeros(2, 3, 16, 12)}, "x: wanted shape"),
        ({"x": torch.zeros(2, 4, 16, 16)}, "filters: wanted those of 4 channels"),
        ({"x": torch.zeros(2, 3, 16, 16).half()}, "x: wanted float32"),
        ({"scale1": torch.zeros(3, 32)}, r"scale1: wanted shape \[2 or 1, 32\]"),
        ({"shift1": torch.zeros(2, 16)}, r"shift1: wanted shape \[2 or 1, 32\]"),
        ({"scale2": torch.zeros(16)}, r"scale2: wanted shape \[2 or 1, 16\]"),
        ({"shift2": torch.zeros(2, 16).double()}, "shift2: wanted float32"),
        ({"window": 5}, "window: wanted at most 4"),
        ({"window": 0}, "window: wanted at most 4"),
        ({"groups": 5}, "num_groups: wanted a divisor"),
        ({"shortcut": 1}, "residual: wanted 16 channels"),
        ({"norms": [torch.zeros(32)]}, "wanted 23 of each, and 4 norms"),
        ({"norms": [torch.zeros(3)] * 4}, r"weight: wanted shape \[32\]"),
        ({"biases": [torch.zeros(16)]}, "wanted 23 of each"),
        ({"filters": [torch.zeros(1, 3, 3, 3, 32)] * 23}, "filters: wanted those of 16 channels"),
    ],
)
def test_the_kernel_refuses(change, message):
    with pytest.raises(RuntimeError, match=message):
        kernels().context_unet(**(call_of(optimized()) | change))


def test_fake():
    torch.library.opcheck(kernels().context_unet.default, tuple(call_of(optimized()).values()))
