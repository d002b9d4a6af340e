"""The engine "auto": what it tries, what it takes, and when it looks again."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref

import pytest
import torch
from engine_models import TABLES, Network, draw, unet
from torch import nn

import diffusion_ext as dx
from diffusion_ext.ops import choices, measuring
from diffusion_ext.sampling import auto, runtimes

pytestmark = pytest.mark.usefixtures("small_work_counts")

OURS = {
    "any": ["eager", "trace", "fused", "fused, trace"],
    "ContextUnet": ["eager", "trace", "optimized", "optimized, trace"],
    "optimized": ["eager", "trace"],
}
HERE = [name for name in ("openvino", "onnxruntime") if not runtimes.missing(name)]
OTHERS = [*HERE, "compile"]  # in the order in which they are tried


def clock(monkeypatch, seconds, default=1.0):
    """Ways take what `seconds` says. Returns the names of those that were timed."""
    timed = []

    def calls(begin, rows, way):
        timed.append(way.name)
        begin(way)
        yield from itertools.repeat(way.name)

    monkeypatch.setattr(auto, "_calls", calls)
    monkeypatch.setattr(measuring, "seconds", lambda way, device: seconds.get(way, default))
    monkeypatch.setattr(measuring, "waited", lambda: 0.0)
    return timed


@pytest.mark.parametrize("kind", OURS)
def test_every_way_is_timed_once_and_the_fastest_taken(kind, monkeypatch):
    models = {"any": Network, "ContextUnet": unet}
    model = models.get(kind, lambda: dx.optimize_for_sampling(unet()))()
    ways = OURS[kind] + OTHERS
    options = {"context": torch.rand(2, 3), "guidance_scale": 2.0, "save_rate": 1}
    expected = draw(model, seeds=3, **options)
    assert expected.engine == "eager"
    for fastest in ways:
        with monkeypatch.context() as patch:
            patch.setenv("DIFFUSION_EXT_CACHE", str(choices.folder().parent / f"{kind}{fastest}"))
            timed = clock(patch, {fastest: 0.5})
            auto._kept.clear()
            if fastest == "compile":  # whose choice is what is looked at here
                patch.setattr(torch, "compile", lambda f, **_: f)
            for _ in range(2):
                ours = draw(model, seeds=3, engine="auto", **options)
                assert ours.engine == fastest
                torch.testing.assert_close(ours.images, expected.images, rtol=1e-4, atol=1e-4)
            assert timed == ways
            found = [choice for choice in dx.info().choices if "auto" in choice.of]
            assert [(choice.taken, list(choice.seconds)) for choice in found] == [(fastest, ways)]


def test_what_needs_more_must_gain_by_it(monkeypatch):
    clock(monkeypatch, {"trace": 0.97, "fused": 0.96, "compile": 0.94})
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    assert draw(Network(), engine="auto").engine == "compile"
    clock(monkeypatch, {"trace": 0.97, "fused": 0.96, "compile": 0.955})
    assert draw(Network(), engine="auto", shape=(1, 3, 8, 8)).engine == "eager"


def test_another_process_takes_what_one_has_measured(monkeypatch):
    timed = clock(monkeypatch, {"trace": 0.5})
    assert draw(Network(), engine="auto").engine == "trace"
    assert draw(Network(), engine="auto", seeds=9).engine == "trace"  # another model of that kind
    assert len(timed) == len(OURS["any"] + OTHERS)
    draw(Network(), engine="auto", shape=(3, 3, 8, 8))
    draw(Network(), engine="auto", context=torch.rand(2, 3))
    wider = Network()
    wider.conv = nn.Conv2d(3, 3, 5, padding=2)
    draw(wider, engine="auto")
    assert len(timed) == 4 * len(OURS["any"] + OTHERS)


def test_ways_that_fail_are_told_of(monkeypatch):
    def compile_(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    clock(monkeypatch, {"compile": 0.5})
    monkeypatch.setattr(torch, "compile", compile_)
    assert draw(Linear(), engine="auto").engine == "eager"
    (choice,) = dx.info().choices
    assert choice.failed["compile"] == "RuntimeError: no compiler here"
    assert choice.failed["fused"] == "RuntimeError: nothing in it to fuse"


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, t, c):
        return self.layer(x)


def test_a_remembered_way_that_no_longer_runs_is_measured_again(monkeypatch):
    timed = clock(monkeypatch, {"fused": 0.5})
    assert draw(Network(), engine="auto").engine == "fused"
    timed.clear()

    def fails(*_):
        raise RuntimeError("no more")

    monkeypatch.setattr(auto, "_fused", fails)
    assert draw(Network(), engine="auto").engine == "eager"
    assert timed == ["eager", "trace", *OTHERS]


def test_the_models_own_error_is_the_users(monkeypatch):
    class Fails(Network):
        def forward(self, x, t, c):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(Fails(), engine="auto")


@pytest.mark.parametrize("taken", ["optimized", "fused"])
@pytest.mark.parametrize("write", ["in place", "data", "loaded"])
def test_changed_weights_are_noticed(taken, write, monkeypatch):
    clock(monkeypatch, {taken: 0.5})
    model = unet() if taken == "optimized" else Network()
    draw(model, engine="auto")
    weight = next(model.parameters())
    with torch.no_grad():
        if write == "in place":
            weight.flatten()[0] += 1
        elif write == "data":
            weight.data.flatten()[-1] += 1
        else:
            state = {
                name: t + 0.1 for name, t in model.state_dict().items() if t.is_floating_point()
            }
            model.load_state_dict(state, strict=False, assign=True)
    ours = draw(model, engine="auto")
    assert ours.engine == taken
    torch.testing.assert_close(ours.images, draw(model).images, rtol=1e-4, atol=1e-4)


def test_the_model_stays_as_it_is(monkeypatch):
    clock(monkeypatch, {"fused": 0.5})
    model = Network().train()
    kinds, before = [type(m) for m in model.modules()], model.state_dict()
    strides = model.conv.weight.stride()
    torch.manual_seed(5)
    draw(model, engine="auto")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # the caller's random numbers are not touched
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training
    assert model.conv.weight.stride() == strides
    (kept,) = auto._kept[model].values()
    assert kept[1].copy.conv.weight is model.conv.weight


def test_goes_with_its_model(monkeypatch):
    clock(monkeypatch, {"fused, trace": 0.5})
    model = Network()
    draw(model, engine="auto")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_last_ones_are_kept(monkeypatch):
    clock(monkeypatch, {})
    model = Network()
    for batch in range(1, auto.KEPT + 3):
        draw(model, shape=(batch, 3, 8, 8), engine="auto")
    assert len(auto._kept[model]) == auto.KEPT


def test_where_there_is_nothing_to_choose(monkeypatch):
    timed = clock(monkeypatch, {})
    assert draw(lambda x, t, c: x / 2, engine="auto").engine == "eager"
    watched = Network()
    watched.conv.register_forward_hook(lambda *_: None)
    assert draw(watched, engine="auto").engine == "eager"
    with torch.autocast("cpu", torch.bfloat16):
        assert draw(Network(), engine="auto").engine == "eager"
    x_T = torch.randn(2, 3, 8, 8, requires_grad=True)
    result = draw(Network(), engine="auto", differentiable=True, x_T=x_T)
    assert result.engine == "eager"
    result.images.sum().backward()
    assert x_T.grad.abs().max() > 0
    assert timed == []


def test_the_callers_noise_and_callback_are_the_runs_own(monkeypatch):
    clock(monkeypatch, {})
    asked = []

    def noise(i, t):
        asked.append(i)
        return torch.zeros(2, 3, 8, 8)

    called = []
    options = {"noise": noise, "callback": lambda i, *_: called.append(i)}
    draw(Network(), table=TABLES["noise"], engine="auto", **options)
    assert asked == [0, 1, 2, 3]
    assert called == [0, 1, 2, 3, 4]


def test_a_measurement_in_doubt_serves_this_process_alone(monkeypatch):
    timed = clock(monkeypatch, {"trace": 0.5})
    waited = itertools.count()  # a second more whenever it is asked for
    monkeypatch.setattr(measuring, "waited", lambda: float(next(waited)))
    model = Network()
    for _ in range(2):
        assert draw(model, engine="auto").engine == "trace"
    assert len(timed) == len(OURS["any"] + OTHERS)
    assert not list(choices.folder().glob("*"))
    assert "in doubt, so no file keeps it" in str(dx.info())
    clock(monkeypatch, {"fused": 0.5})
    assert draw(Network(), engine="auto").engine == "fused"  # a model that was not measured
    assert "in doubt" not in str(dx.info())


def test_one_option_measures_again(monkeypatch):
    clock(monkeypatch, {"trace": 0.5})
    with monkeypatch.context() as before:  # in another process
        before.setattr(measuring.time, "time", lambda: choices.STARTED - 100)
        assert draw(Network(), engine="auto").engine == "trace"
    timed = clock(monkeypatch, {"fused": 0.5})
    assert draw(Network(), engine="auto").engine == "trace"
    monkeypatch.setenv("DIFFUSION_EXT_MEASURE", "again")
    for _ in range(2):
        assert draw(Network(), engine="auto").engine == "fused"
    assert len(timed) == len(OURS["any"] + OTHERS)
    monkeypatch.setenv("DIFFUSION_EXT_MEASURE", "yes")
    with pytest.warns(UserWarning, match="DIFFUSION_EXT_MEASURE: wanted 'again', got 'yes'"):
        assert draw(Network(), engine="auto").engine == "fused"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_told(monkeypatch, capsys, terminal):
    clock(monkeypatch, {"trace": 0.5})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    options = {"table": TABLES["ddim"], "engine": "auto"}
    dx.sample(Network(), (2, 3, 8, 8), **options)
    told = capsys.readouterr().err
    line = "measuring engines, once, for up to a minute: eager; trace; fused"
    assert (line in told) == (not terminal)
    assert ("measuring engines:" in told) == terminal  # the bar
    assert "engine: trace; measured 20" in told
    dx.sample(Network(), (2, 3, 8, 8), **options)
    assert "engine" not in capsys.readouterr().err  # nothing was measured
    dx.sample(Network(), (3, 3, 8, 8), progress=False, **options)
    assert capsys.readouterr().err == ""


@pytest.mark.compiles
def test_measured():
    model = Network()
    ours = draw(model, table=TABLES["noise"], engine="auto", seeds=2)
    torch.testing.assert_close(
        ours.images, draw(model, table=TABLES["noise"], seeds=2).images, rtol=1e-4, atol=1e-4
    )
    (choice,) = dx.info().choices
    assert choice.taken == ours.engine
    assert not choice.failed
    assert choice.seconds.keys() == {*OURS["any"], *OTHERS}
    for way, seconds in choice.seconds.items():
        assert seconds * auto.GAIN >= choice.seconds[choice.taken], way
