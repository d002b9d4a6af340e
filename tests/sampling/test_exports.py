"""The engines that write a network down once: "trace", "onnxruntime" and "openvino"."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_models import MODELS, SHAPE, TABLES, Network, draw, unet
from torch import nn

import diffusion_ext as dx
from diffusion_ext.sampling import exports, runtimes

WAYS = ["trace", "onnxruntime", "openvino"]
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _installed(request):
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else None
    if way in runtimes.PACKAGES and (lacking := runtimes.missing(way)):
        pytest.skip(f"wants {lacking}")


@pytest.fixture
def written(monkeypatch):
    """The ways that networks were written down by, in their order."""
    names, make = [], exports.exported
    monkeypatch.setattr(exports, "exported", lambda way, *a: names.append(way) or make(way, *a))
    return names


def assert_close(ours, expected, way):
    if way == "trace":
        assert torch.equal(ours.images, expected.images)
        assert torch.equal(ours.frames, expected.frames)
    else:
        torch.testing.assert_close(ours.images, expected.images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.frames, expected.frames, rtol=1e-4, atol=1e-4)


@every_way
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_images(way, kind, written):
    model = MODELS[kind]()
    context = torch.rand(2, 3)
    options = {"table": TABLES["noise"], "guidance_scale": 2.0, "save_rate": 1, "context": context}
    for seeds in (3, 4):
        ours = draw(model, engine=way, seeds=seeds, **options)
        torch.testing.assert_close(
            ours.images, draw(model, seeds=seeds, **options).images, rtol=1e-4, atol=1e-4
        )
        assert ours.engine == way
    assert written == [way]
    if kind == "any":  # a ContextUnet's times are embedded at once, an optimized one's too
        assert_close(ours, draw(model, seeds=4, **options), way)


@every_way
@pytest.mark.parametrize("table", TABLES)
def test_every_table(way, table):
    model = Network()
    ours = draw(model, TABLES[table], engine=way, seeds=5)
    torch.testing.assert_close(
        ours.images, draw(model, TABLES[table], seeds=5).images, rtol=1e-4, atol=1e-4
    )


class Structured(nn.Module):
    """A network whose context is a dict of tensors, of which one is not used, and a number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t, context):
        shift = context["shift"] * context["by"] + t[:, None]
        return self.conv(x) + shift[:, :, None, None]


@every_way
def test_structured_contexts_and_unused_inputs(way, written):
    model = Structured().to(memory_format=torch.channels_last)
    for by in (2.0, 3.0):
        context = {"shift": torch.rand(2, 3), "unused": torch.zeros(2, 1), "by": torch.tensor(by)}
        context["by"] = context["by"].expand(2)[:, None]
        assert_close(draw(model, engine=way, context=context), draw(model, context=context), way)
    assert written == [way]


@every_way
def test_numbers_in_a_context_are_not_mixed_up(way, written):
    model = Structured()
    shift = torch.rand(2, 3)
    for by in (2.0, 3.0, 2.0):
        context = {"shift": shift, "by": by}
        assert_close(draw(model, engine=way, context=context), draw(model, context=context), way)
    assert written == [way, way]


@every_way
def test_guidance_by_row_has_two_batch_sizes(way, written):
    table = dx.guided(TABLES["ddim"], [1.0, 3.0, 1.0, 3.0, 1.0])
    model, options = Network(), {"context": torch.rand(2, 3), "table": table}
    assert_close(draw(model, engine=way, **options), draw(model, **options), way)
    assert written == [way, way]


@every_way
@pytest.mark.parametrize("write", ["in place", "data", "loaded", "replaced", "buffer"])
def test_changed_weights_are_noticed(way, write, written):
    model = Network()
    draw(model, engine=way)
    with torch.no_grad():
        if write == "in place":
            model.conv.weight[0, 0, 0, 0] += 1
        elif write == "data":
            model.conv.weight.data[2, 2, 2, 2] += 1
        elif write == "loaded":
            model.load_state_dict(Network().state_dict())
        elif write == "replaced":
            model.conv.bias = nn.Parameter(model.conv.bias + 1)
        else:
            model.scale.mul_(2)
    assert_close(draw(model, engine=way), draw(model), way)
    assert written == [way, way]


@pytest.mark.usefixtures("small_work_counts")
def test_a_trace_reads_a_prepared_filter_once():
    """Filters are laid out before the trace, not by it."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).to(memory_format=torch.channels_last)
    dx.fuse(model)
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    program = exports.exported("trace", model, (x,))
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [op for op in ops if "diffusion_ext" in op] == ["diffusion_ext.conv2d.default"]
    with torch.no_grad():
        assert torch.equal(program(x + 1), model(x + 1))


def test_a_trace_in_other_dtypes_and_under_autocast():
    model = Network().double()
    options = {"dtype": torch.float64, "context": torch.rand(2, 3, dtype=torch.float64)}
    assert_close(draw(model, engine="trace", **options), draw(model, **options), "trace")
    model = Network()
    plain = draw(model, engine="trace")
    with torch.autocast("cpu", torch.bfloat16):
        ours = draw(model, engine="trace")
        assert_close(ours, draw(model), "trace")
    assert not torch.equal(ours.images, plain.images)


@every_way
def test_several_threads(way):
    models = [Network(), Network()]
    expected = [[draw(model, seeds=seed).images for seed in range(4)] for model in models]

    def near(number):
        ours = draw(models[number % 2], seeds=number // 2, engine=way).images
        return (ours - expected[number % 2][number // 2]).abs().max() < 1e-4

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(near, range(8)))
    assert type(models[0]).__call__ is nn.Module.__call__
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"


@every_way
def test_goes_with_its_model(way):
    model = Network()
    draw(model, engine=way)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_last_ones_are_kept(written):
    model = Network()
    for batch in range(1, exports.KEPT + 2):
        draw(model, shape=(batch, 3, 8, 8), engine="trace")
    draw(model, shape=(exports.KEPT + 1, 3, 8, 8), engine="trace")
    assert len(written) == exports.KEPT + 1
    draw(model, shape=(1, 3, 8, 8), engine="trace")
    assert len(written) == exports.KEPT + 2


@every_way
def test_numbers_that_are_none(way):
    """A network that has diverged is one all the same."""
    model = Network()
    with torch.no_grad():
        model.conv.bias[0] = torch.nan
    ours = draw(model, engine=way).images
    assert ours[:, 0].isnan().all()
    torch.testing.assert_close(ours, draw(model).images, rtol=1e-4, atol=1e-4, equal_nan=True)


class Looks(Network):
    """A network that takes a time out of torch."""

    def forward(self, x, t, c):
        return super().forward(x, t, c) + float(t.numpy()[0])


class Asks(Network):
    def forward(self, x, t, c):
        return super().forward(x, t, c) if t[0].item() > 0.5 else x


class Draws(Network):
    def forward(self, x, t, c):
        return super().forward(x, t, c) + torch.randn_like(x)


@pytest.mark.parametrize("model", [Looks, Asks, Draws])
def test_what_depends_on_values_is_refused(model):
    model = model()
    for _ in range(2):  # it is not kept either
        with pytest.raises(RuntimeError, match=r"engine: 'trace' .*engine='eager' runs any model"):
            draw(model, engine="trace")


@pytest.mark.skipif(bool(runtimes.missing("onnxruntime")), reason="wants onnxruntime")
def test_onnxruntime_takes_weights_that_lie_beside_the_program(monkeypatch):
    """As those of more than 2 GB do: one message cannot hold them."""
    program = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 0)
    network, x = torch.nn.Linear(64, 4), torch.randn(2, 64)
    call = exports.exported("onnxruntime", network.eval(), (x,))
    with torch.no_grad():
        torch.testing.assert_close(call(x), network(x))


@pytest.mark.skipif(bool(runtimes.missing("openvino")), reason="wants openvino")
def test_openvino_does_not_keep_a_time():
    with pytest.raises(RuntimeError, match="engine: 'openvino' "):
        draw(Looks(), engine="openvino")


SIGNAL_STACKS = """
import ctypes
import torch
from diffusion_ext.sampling.runtimes import RUNTIMES

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def show_signal_stack():
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    print(stack.start)

exports = []
for _ in range(3):
    exports.append(RUNTIMES["openvino"](torch.nn.Linear(4, 4), (torch.rand(2, 4),)))
    show_signal_stack()
while exports:
    exports.pop(0)
    show_signal_stack()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants sigaltstack")
@pytest.mark.skipif(bool(runtimes.missing("openvino")), reason="wants openvino")
def test_openvino_leaves_no_signal_stack_in_memory_that_is_given_back():
    """It did for each network that was forgotten: the next signal then wrote anywhere."""
    done = subprocess.run([sys.executable, "-c", SIGNAL_STACKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stacks = done.stdout.split()
    assert len(stacks) == 6
    assert len(set(stacks)) == 1


@every_way
def test_bad_input(way):
    with pytest.raises(
        TypeError, match=f"model: engine '{way}' wants a torch.nn.Module, got function"
    ):
        draw(lambda x, t, c: x, engine=way)
    with pytest.raises(ValueError, match=f"differentiable: engine '{way}' has no gradients"):
        draw(Network(), engine=way, differentiable=True)
    if way == "trace":
        return
    with pytest.raises(ValueError, match=f"engine: '{way}' wants float32 samples on the CPU, got "):
        draw(Network().double(), engine=way)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(
            ValueError, match=f"engine: '{way}' runs in float32, got a region of torch.autocast"
        ),
    ):
        draw(Network(), engine=way)


@pytest.mark.parametrize("way", runtimes.PACKAGES)
def test_a_missing_runtime_is_named(way, monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda package: None)
    wanted = ", ".join(runtimes.PACKAGES[way])
    with pytest.raises(ImportError, match=f"engine: '{way}' wants the package {wanted}, which"):
        draw(Network(), engine=way)


def test_a_user_is_told_why(monkeypatch):
    def refuses(network, inputs):
        raise ValueError("an operator is unknown\nand much more")

    monkeypatch.setitem(exports.WAYS, "trace", refuses)
    wanted = r"engine: 'trace' cannot export this network: ValueError: an operator is unknown; "
    with pytest.raises(RuntimeError, match=wanted):
        draw(unet(), engine="trace")
    assert draw(unet(), shape=SHAPE).images.isfinite().all()
