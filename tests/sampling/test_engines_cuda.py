"""The engine "graph" on a GPU; tests/test_engines.py has the rest of it."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import waits_are_errors
from torch import nn

import diffusion_ext as dx
from diffusion_ext.sampling import graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

SCHEDULE = dx.NoiseSchedule.linear(20)
SHAPE = (4, 3, 16, 16)
TABLES = {
    "ddim": dx.ddim(SCHEDULE, 10),
    "ddpm": dx.ddpm(SCHEDULE),
    "two steps back": dx.dpmpp_2m(SCHEDULE, 10, clip=1.0),
}


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def unet(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return dx.nn.ContextUnet(3, 16, 5, 16, **options).cuda().to(dtype).eval()


def draw(model, table=TABLES["ddim"], shape=SHAPE, engine="graph", **options):
    return dx.sample(model, shape, table, progress=False, engine=engine, **options)


def assert_same(model, **options):
    ours, expected = draw(model, **options), draw(model, engine="eager", **options)
    assert torch.equal(ours.images, expected.images)
    assert torch.equal(ours.frames, expected.frames)
    return ours.images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("optimized", [False, True])
def test_a_graph_gives_the_bits_of_eager(table, dtype, optimized):
    model, table = unet(dtype), TABLES[table]
    if optimized:
        model = dx.optimize_for_sampling(model, batch=8)
    context = torch.tensor([0, 4, 2, 1])
    for way in ({}, {"context": context}, {"context": context, "guidance_scale": 2.0}):
        first = assert_same(model, table=table, seeds=3, save_rate=4, **way)
        assert not torch.equal(assert_same(model, table=table, seeds=4, **way), first)


def test_inpainting():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5:] = 1
    for _ in range(2):
        assert_same(
            unet(), table=TABLES["ddpm"], start=torch.randn(SHAPE), mask=mask, first_step=12
        )


def test_the_loop_never_waits_for_the_gpu():
    """Nor does what goes before it in a second run, or frames, callback and progress bar."""
    model, seen = unet(), []
    context = torch.randn(4, 5)
    for seeds in (0, 1):
        options = {"seeds": seeds, "context": context, "guidance_scale": 2.0, "save_rate": 1}
        draw(model, table=TABLES["ddpm"], **options)
    with waits_are_errors():
        seeds = torch.arange(4, device="cuda")
        ours = draw(
            model,
            table=TABLES["ddpm"],
            callback=lambda i, t, x: seen.append(x),
            **(options | {"seeds": seeds}),
        )
        with pytest.raises(RuntimeError, match="synchroniz"):  # so that the mode is known to work
            ours.images.sum().item()
    assert len(seen) == 20
    expected = draw(model, table=TABLES["ddpm"], engine="eager", **(options | {"seeds": seeds}))
    assert torch.equal(ours.frames, expected.frames)


def test_a_second_run_captures_nothing(monkeypatch):
    captured, capture = [], graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *a: (captured.append(a), capture(*a))[1])
    model = unet()
    for seeds in range(3):
        assert_same(model, seeds=seeds)
    assert len(captured) == 1


def test_the_captures_of_a_thread_share_a_stream(monkeypatch):
    used, graph = [], torch.cuda.graph

    def watched(*args, stream, **options):
        used.append(stream)
        return graph(*args, stream=stream, **options)

    monkeypatch.setattr(torch.cuda, "graph", watched)
    for _ in range(2):
        draw(unet())
    with ThreadPoolExecutor(1) as another:
        another.submit(draw, unet()).result()
    first, second, of_another = used
    assert first == second
    assert first != of_another
    assert first != torch.cuda.current_stream()


def test_memory_is_freed_with_the_model():
    def run():
        model = unet()
        draw(model, shape=(64, 3, 16, 16))
        draw(model, shape=(32, 3, 16, 16))
        return weakref.ref(model)

    assert run()() is None  # and what a first run makes for good is made
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert run()() is None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_model_that_cannot_be_captured():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, device="cuda"))

        def forward(self, x, t, c):
            return x * self.weight.item()

    model = Waits()
    with pytest.raises(RuntimeError, match=r"engine: 'graph' cannot capture Waits: .*'eager'"):
        draw(model)
    assert draw(model, engine="eager").images.isfinite().all()
    assert_same(unet())  # the GPU is as usable as before


def test_another_stream():
    model = unet()
    expected = assert_same(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = draw(model).images
    stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(dtype):
    model = unet(dtype)
    ours, expected = draw(model, engine="compile").images, draw(model, engine="eager").images
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * expected.abs().max().item())
