"""The convolutions of a fused model of images that move: which they are, and that they compute
what they did."""

import copy
import pickle

import pytest
import torch
from fused_models import ops_of
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn import kept_weights
from diffusion_ext.nn.kept_filters_3d import layout_of_conv3d
from diffusion_ext.nn.kept_weights import kept_of
from diffusion_ext.ops.conv2d import TIMED

PLAIN = {"in_channels": 16, "out_channels": 20, "kernel_size": 3, "padding": 1}
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


class Causal(nn.Conv3d):
    """As the causal convolutions of video decoders are written."""

    def forward(self, x, before=None):
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if before is None else torch.cat((before, x), dim=2)
        return super().forward(x)


def film(channels=16, frames=5, layout=torch.contiguous_format):
    return torch.randn(2, channels, frames, 9, 10).to(memory_format=layout)


def pair(cls=nn.Conv3d, layout=torch.contiguous_format, **options):
    """A convolution, and one of the same weights that is fused."""
    plain = cls(**(PLAIN | options)).to(memory_format=layout)
    fused = copy.deepcopy(plain)
    return plain, fused, dx.fuse(fused)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert actual.stride() == expected.stride()


def calls(module, *inputs) -> int:
    return ops_of(lambda: module(*inputs))["conv3d"]


@torch.no_grad()
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 0},
        {"padding": (2, 1, 0), "stride": (2, 1, 1)},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "bias": False},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
        {"kernel_size": 1, "padding": 0},
    ],
    ids=str,
)
def test_results_are_those_of_the_original(options, of_x, of_weight):
    plain, fused, report = pair(layout=of_weight, **options)
    assert report.convolutions == ["(model)"]
    for frames in (5, 3):
        x = film(frames=frames, layout=of_x)
        assert_same(fused(x), plain(x))
    one_pixel = options.get("kernel_size") in (1, (3, 1, 1))
    # Of small images torch's result may be contiguous whatever they are.
    in_place = of_x == torch.channels_last_3d and plain(x).stride(1) == 1
    assert calls(fused, x) == (TIMED and (in_place or not one_pixel))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"stride": (1, 2, 2)}, {"in_channels": 3}, {"kernel_size": 5, "padding": 2}],
    ids=str,
)
def test_what_cannot_gain_is_left_and_said(options):
    _, fused, report = pair(**options)
    assert report.left == [("(model)", "torch's is as fast for such filters")]
    assert type(fused) is nn.Conv3d


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dilation": 2}, "dilation (2, 2, 2)"),
        ({"groups": 2}, "groups 2"),
        ({"padding_mode": "replicate"}, "padding_mode replicate"),
        ({"padding": "same"}, "padding 'same'"),
    ],
    ids=str,
)
def test_other_settings_are_left(options, why):
    _, _, report = pair(**options)
    assert report.left == [("(model)", why)]


def test_a_small_call_is_torchs(measured_thresholds):
    _, fused, _ = pair()
    assert calls(fused, film()) == TIMED
    assert calls(fused, torch.randn(1, 16, 1, 4, 4)) == 0


@torch.no_grad()
def test_a_subclass_that_pads_is_served():
    plain, fused, report = pair(Causal, padding=(0, 1, 1))
    assert report.convolutions == ["(model)"]
    assert isinstance(fused, Causal)
    x, before = film(), film(frames=2)
    assert_same(fused(x), plain(x))
    assert_same(fused(x, before), plain(x, before))
    assert calls(fused, x, before) == TIMED


def test_subclasses_that_compute_something_else_are_left():
    class Standardised(nn.Conv3d):
        def forward(self, x):
            weight = self.weight / self.weight.norm()
            return self._conv_forward(x, weight, self.bias)

    class Own(nn.Conv3d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    class Elsewhere(nn.Conv3d):
        def forward(self, x):
            return F.conv3d(x, self.weight)

    for cls in (Standardised, Own, Elsewhere):
        report = dx.fuse(cls(**PLAIN))
        assert report.left == [("(model)", f"{cls.__name__}: does not run Conv3d's forward")]


def test_hooked_replaced_and_parametrized_ones_are_left():
    hooked, replaced, normed, lazy = *(nn.Conv3d(**PLAIN) for _ in range(3)), nn.LazyConv3d(4, 3)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    nn.utils.parametrizations.weight_norm(normed)
    report = dx.fuse(nn.Sequential(hooked, replaced, normed, lazy))
    assert report.convolutions == []
    assert {"0", "1", "2", "3"} <= dict(report.left).keys()


@torch.no_grad()
def test_later_hooks_and_overrides_count():
    plain, fused, _ = pair()
    x, seen = film(), []
    hook = fused.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert_same(fused(x), plain(x))
    assert seen == [(2, 20, 5, 9, 10)]
    hook.remove()
    fused._conv_forward = lambda x, weight, bias: x
    assert fused(x) is x


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "data", "load", "another", "bias", "moved"])
def test_a_changed_weight_is_seen(how):
    plain, fused, _ = pair()
    x = film()
    fused(x)
    for conv in (plain, fused):
        torch.manual_seed(3)
        new = torch.randn(conv.weight.shape) / 20
        if how == "in place":
            conv.weight.mul_(2)
        elif how == "data":
            conv.weight.data.view(-1)[7] += 0.1
        elif how == "load":
            conv.load_state_dict({"weight": new, "bias": torch.ones(20)})
        elif how == "another":
            conv.weight = nn.Parameter(new)
        elif how == "bias":
            conv.bias.add_(1)
        else:
            conv.to(memory_format=torch.channels_last_3d)
    assert_same(fused(x), plain(x))
    assert calls(fused, x) == TIMED


def test_gradients_are_torchs():
    plain, fused, _ = pair()
    inputs = [film().requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    with torch.no_grad():
        fused(inputs[1])
    assert (kept_of(fused) is not None) == TIMED
    for conv, x in zip((plain, fused), inputs, strict=True):
        conv(x).square().sum().backward()
    assert kept_of(fused) is None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(plain.weight.grad, fused.weight.grad)


@torch.no_grad()
def test_what_torch_serves():
    """Other dtypes, autocast, unbatched and empty inputs, function transforms, and its errors."""
    plain, fused, _ = pair()
    x = film()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16
    assert torch.equal(fused(x[0]), plain(x[0]))
    assert fused(x[:0]).shape == (0, 20, 5, 9, 10)
    torch.testing.assert_close(torch.func.vmap(fused)(x[None]), torch.func.vmap(plain)(x[None]))
    for wrong in (x[:, :5], x[:, :, :0], x.double()):
        with pytest.raises(RuntimeError) as torchs:
            plain(wrong)
        with pytest.raises(RuntimeError) as ours:
            fused(wrong)
        assert str(ours.value) == str(torchs.value)
    assert torch.equal(fused.double()(x.double()), plain.double()(x.double()))
    assert kept_of(fused) is None


@torch.inference_mode()
def test_inference_mode():
    plain, fused, _ = pair()
    x = film()
    assert_same(fused(x), plain(x))
    assert calls(fused, x) == TIMED


@torch.no_grad()
def test_little_memory(monkeypatch):
    plain, fused, _ = pair()
    x = film()
    monkeypatch.setattr(kept_weights, "memory_available", lambda: 0)
    assert torch.equal(fused(x), plain(x))
    assert kept_of(fused) is None


@torch.no_grad()
@pytest.mark.skipif(not TIMED, reason="no kernel of ours")
def test_what_memory_the_report_says():
    _, fused, report = pair()
    fused(torch.randn(2, 16, 5, 32, 32))
    assert kept_of(fused).packed.winograd.nbytes == report.filter_bytes
    _, fused, report = pair(kernel_size=(3, 1, 1), padding=0)
    fused(film().repeat(8, 1, 1, 1, 1).to(memory_format=torch.channels_last_3d))
    assert kept_of(fused).packed.direct.nbytes == report.filter_bytes


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 16, 5, 8, 9), (2, 1, 1, 5, 5), (1, 16, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_memory_format_that_torch_gives(shape, kernel, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for of_x in LAYOUTS:
            for of_weight in LAYOUTS:
                x = torch.randn(shape).to(memory_format=of_x)
                conv = nn.Conv3d(shape[1], 4, kernel, padding=kernel // 2)
                conv.to(memory_format=of_weight)
                y = conv(x)
                expected = torch.empty(y.shape, memory_format=layout_of_conv3d(conv, x))
                assert y.stride() == expected.stride()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_copies_pickles_and_unfusing():
    plain, fused, _ = pair(Causal, padding=(0, 1, 1))
    x = film()
    expected = plain(x)
    fused(x)
    assert_same(copy.deepcopy(fused)(x), expected)
    model = nn.Sequential(nn.Conv3d(**PLAIN))
    dx.fuse(model)
    again = pickle.loads(pickle.dumps(model))
    assert_same(again(x), model(x))
    assert dx.fuse(fused).convolutions == ["(model)"]
    dx.unfuse(fused)
    assert type(fused) is Causal
    assert kept_of(fused) is None
    assert torch.equal(fused(x), expected)


@torch.no_grad()
@pytest.mark.compiles
@pytest.mark.parametrize("cls", [nn.Conv3d, Causal])
def test_compiled_and_exported(cls):
    plain, fused, _ = pair(cls, padding=(0, 1, 1))
    x = film()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    for strict in (True, False):
        program = torch.export.export(fused, (x,), strict=strict).module()
        torch.testing.assert_close(program(x), plain(x), rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(fused, (x,))
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_merged_adapter_is_seen():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(**PLAIN))
    x = film()
    dx.fuse(model)
    model(x)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    before = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), before, rtol=1e-4, atol=1e-4)
