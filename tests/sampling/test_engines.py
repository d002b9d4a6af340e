"""The engines of `sample`: "graph", on a recording that the CPU plays.

tests/sampling/test_engines_cuda.py has what only a GPU can show.
"""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_models import MODELS, SCHEDULE, SHAPE, TABLES, Network, draw, unet
from torch import nn

import diffusion_ext as dx
from diffusion_ext.sampling import graphs


@pytest.fixture
def captures(monkeypatch):
    """The CPU records and plays steps as a GPU captures and replays them; what it recorded."""
    recorded = []

    def capture(body, row):
        body()  # a capture leaves other values than a run starts from
        recorded.append(body)
        return body

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "capture", capture)
    return recorded


def assert_same(model, **options):
    ours = draw(model, engine="graph", **options)
    expected = draw(model, engine="eager", **options)
    assert torch.equal(ours.images, expected.images)
    assert torch.equal(ours.frames, expected.frames)
    assert ours.frame_timesteps.tolist() == expected.frame_timesteps.tolist()
    return ours.images


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_gives_the_bits_of_eager(captures, model, table, backend):
    model, table = MODELS[model](), TABLES[table]
    ways = [{}, {"context": torch.tensor([2, 0])}]
    ways.append({**ways[1], "guidance_scale": 2.5, "save_rate": 20})
    with dx.use_backend(backend):
        for way in ways:
            images = assert_same(model, table=table, seeds=5, **way)
            assert not torch.equal(images, draw(model, table, seeds=6, **way).images)
    assert len(captures) == len(ways)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_memory_formats(captures, dtype, memory_format):
    model = Network().to(dtype).to(memory_format=memory_format)
    for table in TABLES.values():
        assert_same(model, table=table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("table", ["ddim", "noise", "two steps back", "predictor and corrector"])
def test_image_to_image_and_inpainting(captures, table, dtype):
    model, mask = Network().to(dtype), torch.zeros(1, 1, 8, 8)
    mask[..., 3:] = 1
    for way in ({"first_step": 2}, {"mask": mask}, {"mask": mask, "first_step": 3}):
        for _ in range(2):  # another image, the same graph
            assert_same(model, table=TABLES[table], start=torch.randn(SHAPE), save_rate=1, **way)
    assert len(captures) == 2


@pytest.mark.parametrize("model", MODELS)
def test_guidance_in_an_interval_has_a_graph_for_each_kind_of_row(captures, model):
    """Rows of scale 1 leave the half without the context out, captured too."""
    model, options = MODELS[model](), {"context": torch.tensor([2, 0])}
    table = dx.guided(TABLES["noise"], 2.5, (0.05, 0.4))
    assert 0 < (table.guidance == 1).sum() < len(table)
    assert_same(model, table=table, **options)
    assert len(captures) == 2
    assert_same(model, table=dx.guided(TABLES["noise"], 3.5, (0.05, 0.4)), **options)
    assert len(captures) == 2
    assert_same(model, table=dx.guided(TABLES["noise"], 2.5), **options)
    assert len(captures) == 3


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_serves_all_runs_of_its_kind(captures, model):
    model = MODELS[model]()
    assert_same(model, context=torch.tensor([1, 2]))
    assert_same(model, context=torch.randn(2, 3), seeds=torch.tensor([7, 2]))
    assert_same(model, context=torch.randn(2, 3), x_T=torch.randn(SHAPE))
    assert_same(model, context=torch.randn(2, 3), table=dx.ddim(dx.NoiseSchedule.cosine(50), 5))
    assert len(captures) == 1
    assert_same(model, context=torch.randn(3, 3), shape=(3, 3, 8, 8))
    assert_same(model, context=torch.randn(2, 3), table=dx.ddim(SCHEDULE, 6))
    assert_same(model, context=torch.randn(2, 3), guidance_scale=2.0)
    assert len(captures) == 4


def test_contexts_of_any_structure(captures):
    def model(x, t, c):
        return c["scale"] * x + c["more"][0] + t.reshape(-1, 1, 1, 1)

    for scale in (0.1, 0.2, 0.1):
        for _ in range(2):
            context = {"scale": scale, "more": (torch.randn(2, 1, 1, 1),)}
            assert_same(model, context=context, guidance_scale=1.5)
    assert len(captures) == 2
    unknown = type("Unknown", (), {"__hash__": None})()
    for _ in range(2):  # whether it is the same cannot be told
        assert_same(model, context={"scale": 0.1, "more": (torch.ones(2, 1, 1, 1),), "u": unknown})
    assert len(captures) == 4


def test_weights_that_changed(captures):
    """In place, the graph reads them; moved elsewhere, it would read what is gone."""
    model = Network()
    before = assert_same(model)
    with torch.no_grad():
        model.conv.weight.mul_(2)
        model.scale.mul_(0.5)
    assert not torch.equal(assert_same(model), before)
    assert len(captures) == 1
    kept = model.conv.weight
    model.conv.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
    assert_same(model)
    assert kept is not model.conv.weight
    assert len(captures) == 2


def test_the_last_graphs_are_kept(captures):
    model = Network()
    for batch in (1, 2, 3, 4, 5, 2, 3, 4, 5):
        draw(model, shape=(batch, 3, 8, 8), engine="graph")
    assert len(captures) == 5
    draw(model, shape=(1, 3, 8, 8), engine="graph")
    assert len(captures) == 6


@pytest.mark.parametrize("model", MODELS)
def test_graphs_go_with_their_model(captures, monkeypatch, model):
    made = []
    load = graphs.Graph.load

    def noted(self, tensors):
        made.append(weakref.ref(self))
        load(self, tensors)

    monkeypatch.setattr(graphs.Graph, "load", noted)
    monkeypatch.setattr(graphs, "capture", lambda body, row: lambda: None)
    model = MODELS[model]()
    draw(model, engine="graph")
    gc.collect()
    assert made[0]() is not None
    del model
    gc.collect()
    assert made[0]() is None


def test_a_run_that_was_interrupted(captures):
    model = Network()

    def stop(i, t, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, engine="graph", callback=stop)
    assert_same(model)


def test_a_run_within_a_run(captures):
    """Of the same kind: each has a graph of its own."""
    model, inner = Network(), []

    def run(i, t, x):
        if not inner:
            inner.append(draw(model, seeds=3, engine="graph").images)

    outer = draw(model, seeds=4, engine="graph", callback=run)
    assert torch.equal(outer.images, draw(model, seeds=4).images)
    assert torch.equal(inner[0], draw(model, seeds=3).images)


def test_results_are_the_callers(captures):
    model, seen = Network(), []
    first = draw(model, engine="graph", seeds=1, save_rate=1, callback=lambda *a: seen.append(a))
    images, frames = first.images.clone(), first.frames.clone()
    draw(model, engine="graph", seeds=2, save_rate=1)
    assert torch.equal(first.images, images)
    assert torch.equal(first.frames, frames)
    assert [(i, t) for i, t, _ in seen] == [(0, 100), (1, 80), (2, 60), (3, 40), (4, 20)]


def test_models_that_nothing_can_refer_to(captures):
    class Slots:
        __slots__ = ()

        def __call__(self, x, t, c):
            return x * 0.5

    for model in (Slots(), unet().forward):
        assert_same(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": lambda i, t: torch.zeros(SHAPE)}, "noise: engine 'graph' makes its own .* func"),
        ({"noise": torch.Generator()}, "noise: engine 'graph' makes its own .* Generator"),
        ({"differentiable": True}, "differentiable: engine 'graph' has no gradients"),
    ],
)
def test_what_a_graph_cannot_do(captures, options, message):
    with pytest.raises(ValueError, match=message):
        draw(Network(), engine="graph", **options)


def test_the_streams_of_captures(monkeypatch):
    """One for a device in a thread, however often it captures."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    devices = [torch.device("cuda", index) for index in (0, 1)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        captures = [(thread, device) for thread in (one, another) for device in devices]
        first, second = (
            [thread.submit(graphs.capture_stream, device).result() for thread, device in captures]
            for _ in range(2)
        )
    assert first == second
    assert len(set(first)) == len(captures)


def test_a_graph_wants_a_gpu():
    with pytest.raises(ValueError, match="engine: 'graph' wants samples on a CUDA device, got cpu"):
        draw(Network(), engine="graph")


def test_a_model_that_cannot_be_captured(captures, monkeypatch):
    def fails(body, row):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError as error:
            raise graphs.Uncapturable("RuntimeError: not permitted") from error

    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.raises(
        RuntimeError, match=r"engine: .*Network: .*permitted.*engine='eager'"
    ) as info:
        draw(Network(), engine="graph")
    assert "stream is capturing" in str(info.value.__cause__)
