"""fuse and unfuse over torch's own modules, guided-diffusion's style and the package's UNet."""

import pytest
import torch
from fused_models import assert_same_results, fused_copy, identity_of, ops_of, results
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

import diffusion_ext as dx
from diffusion_ext.ops.backend import missing

pytestmark = pytest.mark.skipif("cpu" in missing, reason="fuse waits for a kernel: none is built")


class Swish(nn.Module):
    def forward(self, value):
        """Its docstring does not matter."""
        return value * torch.sigmoid(value)


class NotQuiteSwish(nn.Module):
    def forward(self, value):
        return value + torch.sigmoid(value)


class GroupNorm32(nn.GroupNorm):
    def forward(self, h):
        return super().forward(h.float()).type(h.dtype)


class CentredNorm(nn.GroupNorm):
    def forward(self, h):
        """What a norm of groups does not see, so that this is one."""
        return super().forward(h - h.mean())


class LoudNorm(nn.GroupNorm):
    def forward(self, h):
        return 2 * super().forward(h)


class AdaptiveBlock(nn.Module):
    """A residual block in guided-diffusion's style: its Sequentials are taken apart and sliced."""

    def __init__(self, channels=8, embedding=6):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * channels))
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out_layers = nn.Sequential(GroupNorm32(4, channels), nn.SiLU(), nn.Dropout(0.0), conv)

    def forward(self, x, emb):
        rest, conv = self.in_layers[:-1], self.in_layers[-1]
        h = conv(rest(x))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, dim=1)
        norm, rest = self.out_layers[0], self.out_layers[1:]
        return x + rest(norm(h) * (1 + scale) + shift)


class SharedActivation(nn.Module):
    """One SiLU, registered after a norm that it never follows."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.layers = nn.Sequential(nn.GroupNorm(4, 8), self.act)

    def forward(self, x):
        return self.norm(x) + self.act(x) + self.layers(x)


ACTIVATIONS = {
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "swish": Swish,
}


def sequential(act="silu"):
    first = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), ACTIVATIONS[act]()
    return vary(nn.Sequential(*first, nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6)))


def vary(model):
    """Norms' parameters away from 1 and 0, where a mistake in them would not show."""
    for p in model.parameters():
        nn.init.normal_(p, mean=0.2, std=0.3)
    return model.eval()


def cases():
    """name -> (model, inputs)"""
    x, emb = torch.randn(2, 8, 6, 5), torch.randn(2, 6)
    unet = vary(dx.nn.ContextUnet(3, 8, 5, 8, norm="group"))
    flat = nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv1d(8, 2, 1))
    volume = nn.Sequential(nn.GroupNorm(4, 8), nn.GELU(), nn.Conv3d(8, 2, 1))
    return {
        **{act: (sequential(act), [torch.randn(2, 3, 5, 4)]) for act in ACTIVATIONS},
        "guided": (vary(AdaptiveBlock()), [x, emb]),
        "shared": (vary(SharedActivation()), [x]),
        "norm": (vary(nn.GroupNorm(2, 8)), [x]),
        "norm without parameters": (nn.GroupNorm(2, 8, affine=False), [x]),
        "1d": (vary(flat), [torch.randn(3, 8, 7)]),
        "3d": (vary(volume), [torch.randn(2, 8, 3, 2, 4)]),
        "context unet": (unet, [torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5)]),
    }


CASES = list(cases())


@pytest.fixture(params=CASES)
def case(request):
    return cases()[request.param]


def test_results_and_gradients_are_those_of_the_original(case):
    model, inputs = case
    expected = results(model, inputs)
    fused, _ = fused_copy(model)
    assert_same_results(results(fused, inputs), expected, 1e-5)


def test_unfuse_restores_exactly_and_the_state_dict_never_changes(case):
    model, inputs = case
    before = identity_of(model), repr(model), [(type(m), sorted(vars(m))) for m in model.modules()]
    y = model(*inputs)
    report = dx.fuse(model)
    assert identity_of(model) == before[0]
    assert dx.fuse(model).details() == report.details()  # again: nothing to do
    dx.unfuse(model)
    after = identity_of(model), repr(model), [(type(m), sorted(vars(m))) for m in model.modules()]
    assert after == before
    assert torch.equal(model(*inputs), y)
    assert dx.fuse(model) == report
    dx.unfuse(model)
    dx.unfuse(model)
    assert repr(model) == before[1]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_fused_op_serves_and_the_activation_is_in_it(act):
    model = sequential(act)
    dx.fuse(model)
    count = ops_of(lambda: model(torch.randn(2, 3, 5, 4)))
    assert count["group_norm_act"] == 2
    assert not count.keys() & {"native_group_norm", "silu", "silu_", "relu", "gelu", "sigmoid"}


def test_a_report_says_what_and_why():
    model = nn.Sequential(
        *(nn.GroupNorm(2, 4), nn.SiLU(), LoudNorm(2, 4), nn.GroupNorm(2, 4)),
        *(nn.GroupNorm(2, 4), nn.LeakyReLU(), dx.nn.GroupNormAct(2, 4), nn.GroupNorm(2, 4, eps=0)),
        *(GroupNorm32(2, 4), Swish(), nn.GroupNorm(2, 4), NotQuiteSwish()),
    )
    model[3].register_forward_hook(lambda *_: None)
    report = dx.fuse(model)
    assert report.fused == [
        ("0", "with SiLU"), ("4", "alone"), ("8", "with Swish"), ("10", "alone")
    ]  # fmt: skip
    assert report.left == [
        ("2", "LoudNorm: computes something else than a group norm"),
        ("3", "has hooks"),
        ("6", "GroupNormAct: on the fused op already"),
        ("7", "eps is 0"),
    ]
    assert str(report) == repr(report)
    assert str(report) == "4 norms fused, 4 layers left; .details() has their names and reasons"
    first, *lines = report.details().splitlines()
    assert first == "4 norms fused, 4 layers left as they were"
    assert lines[0].split() == ["fused", "1", "with", "SiLU"]
    assert lines[1].split() == ["0"]
    assert type(model[2]) is LoudNorm
    assert type(model[3]) is nn.GroupNorm
    assert dx.fuse(nn.GroupNorm(1, 2)).fused == [("(model)", "alone")]
    nothing = dx.fuse(nn.Identity()).details()
    assert nothing == "0 norms fused, 0 layers left as they were"


def test_hooks_see_what_they_saw():
    """A hook that is there keeps its norm; one that comes later undoes the fusing it would miss."""
    x = torch.randn(2, 3, 5, 4)
    for place in (1, 2):
        for early in (True, False):
            model, seen = sequential(), []
            model(x)
            if not early:
                dx.fuse(model)
            model[place].register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
            dx.unfuse(model)
            expected = model(x)
            report = dx.fuse(model)
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(seen[1], seen[0])
            assert len(seen) == 2
            left = {1: [("1", "has hooks")], 2: []}[place]
            assert report.left == left
    assert report.fused[0] == ("1", "alone: the SiLU after it has hooks")


def test_hooks_on_every_module_see_what_they_saw():
    """torch's module trackers and flop counters hook all modules at once."""
    model, x = sequential(), torch.randn(2, 3, 5, 4)

    def seen():
        outputs = []
        hook = register_module_forward_hook(lambda m, args, y: outputs.append((m, y)))
        model(x)
        hook.remove()
        return outputs

    expected = seen()
    dx.fuse(model)
    for (module, y), (wanted, y_wanted) in zip(seen(), expected, strict=True):
        assert module is wanted
        torch.testing.assert_close(y, y_wanted)
    assert ops_of(lambda: model(x))["silu"] == 0


def test_a_sequential_of_its_own_kind_and_a_replaced_forward_are_left():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    model = vary(Reversed(nn.GroupNorm(2, 4), nn.SiLU()))
    x = torch.randn(2, 4, 3)
    expected = model(x)
    assert dx.fuse(model).fused == [("0", "alone: Reversed may run its children in its own way")]
    torch.testing.assert_close(model(x), expected)
    norm = nn.GroupNorm(2, 4)
    norm.forward = lambda x: x
    assert dx.fuse(norm).left == [("(model)", "its forward is replaced on the instance")]


def test_inputs_that_no_kernel_serves_run_as_before():
    model = sequential().double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = model(x)
    fused, _ = fused_copy(model)
    assert torch.equal(fused(x), expected)
    norm = nn.GroupNorm(2, 4)
    flat, many = torch.randn(5, 4), torch.randn(2, 4, 1, 2, 1, 2)
    expected = norm(flat), norm(many)
    dx.fuse(norm)
    assert torch.equal(norm(flat), expected[0])
    assert torch.equal(norm(many), expected[1])
    x = torch.randn(2, 4, 3)
    for broken, message in (
        (lambda: norm(torch.randn(2, 6, 3)), "Expected weight to be a vector"),
        (lambda: norm(x.to_sparse()), "unsupported memory format"),
        (lambda: functional_call(norm, {"weight": torch.ones(2, 4)}, x), "weight to be a vector"),
        (lambda: functional_call(norm, {"bias": torch.ones(3)}, x), "bias to be a vector"),
        (lambda: functional_call(norm, {"bias": torch.ones(4, device="meta")}, x), "meta"),
    ):
        with pytest.raises(RuntimeError, match=message):  # torch's own errors
            broken()
    assert norm.to("meta")(torch.empty(2, 4, 3, device="meta")).shape == (2, 4, 3)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got dict"):
        dx.fuse({})
    with pytest.raises(TypeError, match=r"model: wanted a torch.nn.Module, got list"):
        dx.unfuse([])


@pytest.mark.parametrize("pair", [(nn.GroupNorm(4, 16),), (nn.GroupNorm(4, 16), nn.SiLU())])
def test_norms_of_vectors(pair):
    model = nn.Sequential(nn.Linear(8, 16), *pair)
    x = torch.randn(5, 8)
    expected = model(x)
    assert len(dx.fuse(model).fused) == 1
    torch.testing.assert_close(model(x), expected)


def test_a_group_of_one_value_is_refused_as_torch_refuses_it():
    model = nn.Sequential(nn.GroupNorm(4, 4), nn.SiLU())
    dx.fuse(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 4))
