"""The sampling loop: the oracles, seeds, guidance, frames, and what it promises of memory."""

import io

import pytest
import torch
from torch import nn

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)


def stand_in(x, t, c):
    """The oracle's network."""
    return torch.tanh(0.7 * x + 0.3 * t.reshape(-1, 1, 1, 1)) * 0.9 + 0.1 * x


class Labelled(nn.Module):
    """A network whose output shows its context and its mode."""

    n_cfeat = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))
        self.modes = []

    def forward(self, x, t, c):
        self.modes.append(self.training)
        shift = 0 if c is None else (c @ self.weight.to(c)).reshape(-1, 1, 1, 1)
        return stand_in(x, t, None) + shift


def sample(model=stand_in, shape=(2, 3, 8, 8), table=None, **options):
    table = table or dx.ddim(SCHEDULE, 5)
    return dx.sample(model, shape, table, progress=False, **options)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_ddpm_oracle(loops, backend, dtype, atol):
    x_T, z = torch.tensor(loops["x_T"], dtype=dtype), torch.tensor(loops["z"], dtype=dtype)
    with dx.use_backend(backend):
        result = sample(
            table=dx.ddpm(SCHEDULE),
            x_T=x_T,
            noise=lambda i, t: z[t],
            save_rate=20,
            dtype=dtype,
        )
    final, kept = torch.tensor(loops["ddpm_final"]), torch.tensor(loops["ddpm_kept"])
    torch.testing.assert_close(result.images.double(), final, rtol=0, atol=atol)
    assert result.frame_timesteps.tolist() == loops["ddpm_kept_t"].tolist()
    torch.testing.assert_close(result.frames.double(), kept, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_ddim_oracle(loops, backend, steps, dtype, atol):
    x_T = torch.tensor(loops["x_T"], dtype=dtype)
    with dx.use_backend(backend):
        result = sample(table=dx.ddim(SCHEDULE, steps), x_T=x_T, dtype=dtype)
    expected = torch.tensor(loops[f"ddim_{steps}_final"])
    torch.testing.assert_close(result.images.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("table", [dx.ddpm(SCHEDULE), dx.ddim(SCHEDULE, 5, eta=1.0)])
def test_an_image_depends_on_its_seed_alone(table):
    whole = sample(shape=(5, 3, 8, 8), table=table, seeds=10).images
    for b, seed in ((0, 10), (3, 13)):
        alone = sample(shape=(1, 3, 8, 8), table=table, seeds=torch.tensor([seed])).images
        assert torch.equal(whole[b : b + 1], alone)
    assert not torch.equal(whole[0], whole[1])


def test_initial_latents_are_stream_zero():
    shape = (2, 3, 8, 8)
    images = sample(seeds=4).images
    by_hand = sample(x_T=dx.philox_normal(4, shape)).images
    assert torch.equal(images, by_hand)


def test_noise_is_asked_for_only_where_it_counts():
    asked = []

    def noise(i, t):
        asked.append((i, t))
        return torch.zeros(2, 3, 8, 8)

    sample(table=dx.ddim(SCHEDULE, 5, eta=1.0), noise=noise)
    assert asked == [(0, 100), (1, 80), (2, 60), (3, 40)]  # not at the last step
    asked.clear()
    sample(table=dx.ddim(SCHEDULE, 5), noise=noise)
    assert asked == []


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_guidance_is_one_doubled_batch(backend):
    """Against the loop written out: m_0 + w (m_c - m_0) with an all-zero context for m_0."""
    model, labels = Labelled().eval(), torch.tensor([0, 2])
    table, w = dx.ddim(SCHEDULE, 5), 2.5
    with dx.use_backend(backend), torch.no_grad():
        images = sample(model, table=table, context=labels, guidance_scale=w, seeds=1).images
        x, one_hot = dx.philox_normal(1, (2, 3, 8, 8)), nn.functional.one_hot(labels, 3).float()
        for i, t in enumerate(table.timesteps.tolist()):
            times = torch.full((2,), t / 100)
            m0, mc = model(x, times, torch.zeros(2, 3)), model(x, times, one_hot)
            t_prev = [*table.timesteps.tolist(), 0][i + 1]
            x = dx.ddim_step(x, m0 + w * (mc - m0), t, t_prev, SCHEDULE)
    torch.testing.assert_close(images, x, rtol=0, atol=2e-5)
    assert len(model.modes) == 5 + 10


def test_labels_are_one_hot():
    labels = torch.tensor([2, 0])
    by_label = sample(Labelled(), context=labels).images
    one_hot = nn.functional.one_hot(labels, 3).float()
    assert torch.equal(by_label, sample(Labelled(), context=one_hot).images)
    assert not torch.equal(by_label, sample(Labelled()).images)


def test_modes_are_restored_and_gradients_off():
    model = Labelled()
    model.child = nn.BatchNorm2d(3).eval()
    x_T = torch.zeros(2, 3, 8, 8).requires_grad_()
    result = sample(model, context=torch.tensor([0, 1]), x_T=x_T)
    assert model.training
    assert not model.child.training
    assert model.modes == [False] * 5
    assert not result.images.requires_grad


def test_the_sample_is_updated_in_place():
    seen = set()
    result = sample(callback=lambda i, t, x: seen.add(x.data_ptr()))
    assert seen == {result.images.data_ptr()}
    guided = sample(Labelled(), context=torch.tensor([0, 1]), guidance_scale=2.0).images
    assert guided.untyped_storage().nbytes() == guided.nbytes  # not a view of the doubled batch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_loop_allocates_nothing_per_step(memory_format):
    """A network that allocates nothing: the profiler sees no allocation inside the loop."""
    output = torch.zeros(4, 3, 8, 8).to(memory_format=memory_format)
    steps = []

    def model(x, t, c):
        steps.append(None)
        return output

    table = dx.ddim(SCHEDULE, 20, eta=1.0)
    sample(model, (4, 3, 8, 8), table)  # tables are copied to the device here

    def allocated(table, model=model):
        with torch.profiler.profile(profile_memory=True) as profile:
            sample(model, (4, 3, 8, 8), table, x_T=output)
        return sum(e.self_cpu_memory_usage > 0 for e in profile.events())

    short = dx.ddim(SCHEDULE, 10, eta=1.0)
    sample(model, (4, 3, 8, 8), short)
    assert allocated(table) == allocated(short)
    assert len(steps) == 60
    assert allocated(table, lambda *_: output + 1) > allocated(short, lambda *_: output + 1)


def test_the_callback_sees_every_step():
    seen = []
    result = sample(callback=lambda i, t, x: seen.append((i, t, x.clone())))
    assert [(i, t) for i, t, _ in seen] == [(0, 100), (1, 80), (2, 60), (3, 40), (4, 20)]
    assert torch.equal(seen[-1][2], result.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype(dtype):
    result = sample(dtype=dtype, save_rate=1)
    assert result.images.dtype == result.frames.dtype == dtype
    assert result.frames.shape == (5, 2, 3, 8, 8)
    exact = sample(dtype=torch.float64).images
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1}.get(dtype, 1e-4)
    torch.testing.assert_close(result.images.double(), exact, rtol=0, atol=tolerance)


def test_a_half_precision_network_in_a_float32_loop():
    result = sample(lambda x, t, c: stand_in(x, t, c).bfloat16())
    torch.testing.assert_close(result.images, sample().images, rtol=0, atol=0.1)


def test_the_model_sees_t_over_T():
    seen = []

    def model(x, t, c):
        seen.append(t.clone())
        return x

    sample(model, table=dx.ddim(SCHEDULE, 3))
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.tensor([1.0, 0.67, 0.33]))
    assert seen[0].shape == (2,)


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, True)])
def test_the_progress_bar_is_for_terminals(monkeypatch, terminal, progress):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    dx.sample(stand_in, (1, 3, 8, 8), dx.ddim(SCHEDULE, 3), progress=progress)
    assert ("3/3" in screen.getvalue()) == (terminal and progress)


def test_empty_batch():
    assert sample(shape=(0, 3, 8, 8)).images.shape == (0, 3, 8, 8)
    context = torch.ones(0, dtype=torch.int64)
    guided = sample(Labelled(), shape=(0, 3, 8, 8), context=context, guidance_scale=2.0)
    assert guided.images.shape == (0, 3, 8, 8)


def test_the_memory_format_is_the_networks():
    network = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
    formats = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t, c):
            formats.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.network(x)

    turned = sample(Model())
    assert all(formats)
    network.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(turned.images, sample(Model()).images)
    assert not formats[-1]


def test_a_generator_draws_all_the_noise():
    table = dx.ddim(SCHEDULE, 3, eta=1.0)
    by_generator = sample(table=table, noise=torch.Generator().manual_seed(5)).images
    generator = torch.Generator().manual_seed(5)
    x_T, *z = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3))
    by_hand = sample(table=table, x_T=x_T, noise=lambda i, t: z[i]).images
    assert torch.equal(by_generator, by_hand)


def test_an_inference_mode_run_leaves_no_trace():
    """Tables first needed in inference mode do not spoil later gradients."""
    schedule = dx.NoiseSchedule.linear(30)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        dx.ddpm_step(x, x, 5, schedule)
        dx.perturb(x, torch.tensor([1, 2]), schedule, seeds=0)
    leaf = torch.randn(2, 3, requires_grad=True)
    dx.ddpm_step(leaf, x, 5, schedule).sum().backward()
    assert leaf.grad.abs().min() > 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (-1, 3)}, ValueError, r"shape: wanted \(B, C, H, W\)"),
        ({"engine": "warp"}, ValueError, "engine: wanted one of"),
        ({"save_rate": 0}, ValueError, "save_rate: wanted at least 1, got 0"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: 2.0 wants a context"),
        (
            {"context": torch.zeros(3, 3)},
            ValueError,
            r"wanted 2 rows, the batch of shape \(2, 3, 8, 8\)",
        ),
        ({"context": [1, 2]}, TypeError, r"context: wanted a tensor, .* got \[1, 2\] without one"),
        (
            {"context": torch.tensor([0, 3])},
            ValueError,
            "context: wanted values from 0 to 2, got 0 to 3",
        ),
        ({"context": torch.ones(2, 3).int()}, TypeError, r"context: wanted .*int32 \[2, 3\]$"),
        ({"seeds": 1.5}, TypeError, "seeds: wanted an int"),
        ({"seeds": torch.tensor([1])}, ValueError, r"seeds: wanted shape \[2\]"),
        ({"seeds": torch.ones(2)}, TypeError, "seeds: wanted dtype torch.int64"),
        ({"x_T": torch.zeros(1, 3, 8, 8)}, ValueError, r"x_T: wanted shape \[2, 3, 8, 8\]"),
        ({"save_rate": 2.5}, TypeError, "save_rate: wanted an int, got float"),
        ({"shape": 4}, TypeError, r"shape: wanted \(B, C, H, W\), got 4"),
        ({"shape": (1.5, 3)}, TypeError, r"shape: wanted \(B, C, H, W\) of ints"),
        ({"table": "ddpm"}, TypeError, "table: wanted a StepTable"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale: wanted a finite"),
        ({"context": torch.ones(2)}, TypeError, r"labels, int64 \[2\], or .* context.long\(\)"),
        ({"noise": torch.ones(2)}, TypeError, "noise: wanted a function .* got Tensor .x_T takes"),
        ({"dtype": torch.int32}, TypeError, "dtype: wanted float16"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        sample(Labelled(), **options)


def test_bad_models_and_noise():
    with pytest.raises(ValueError, match=r"model: wanted an output of shape .* got \[2, 1, 8, 8\]"):
        sample(lambda x, t, c: x[:, :1])
    with pytest.raises(ValueError, match=r"model: wanted an output .* got tuple"):
        sample(lambda x, t, c: (x,))
    with pytest.raises(TypeError, match=r"context: wanted vectors, .* function has no n_cfeat"):
        sample(context=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"noise: wanted x's shape"):
        sample(table=dx.ddpm(SCHEDULE), noise=lambda i, t: torch.zeros(1))
