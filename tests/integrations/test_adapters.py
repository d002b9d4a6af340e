"""Models of other libraries in `sample`, and contexts of every structure."""

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext import adapters

SCHEDULE = dx.NoiseSchedule.linear(1000)
SHAPE = (2, 3, 8, 8)


def draw(model, table=None, **options):
    table = table or dx.ddim(SCHEDULE, 4)
    return dx.sample(model, SHAPE, table, progress=False, **options).images


class Said:
    """A diffusers-like output."""

    def __init__(self, sample):
        self.sample = sample


def test_a_diffusers_model_sees_its_own_timesteps():
    seen = []

    def unet(x, timestep, encoder_hidden_states=None, class_labels=None):
        seen.append((timestep, encoder_hidden_states, class_labels))
        return Said(x * 0.1)

    plain = draw(lambda x, t, c: x * 0.1)
    assert torch.equal(draw(adapters.from_diffusers(unet)), plain)
    assert [s[0].tolist() for s in seen] == [[t] * 2 for t in (999, 749, 499, 249)]
    assert all(s[1] is None for s in seen)
    prompt, labels = torch.randn(2, 5, 4), torch.tensor([3, 4])
    draw(adapters.from_diffusers(unet), context=prompt)
    assert torch.equal(seen[-1][1], prompt)
    draw(adapters.from_diffusers(unet), context={"class_labels": labels})
    assert torch.equal(seen[-1][2], labels)


def test_half_precision_keeps_the_timesteps_apart():
    seen = []

    def unet(x, timestep):
        seen.append(timestep[0].item())
        return Said(x * 0.1)

    draw(adapters.from_diffusers(unet), dx.ddpm(SCHEDULE), dtype=torch.bfloat16)
    assert seen == list(range(999, -1, -1))


def test_a_model_of_mean_and_variance():
    def model(x, t, y):
        assert y.tolist() == [1, 2]
        return torch.cat([0.1 * x, torch.full_like(x, torch.nan)], dim=1)

    ours = draw(adapters.from_guided_diffusion(model), context={"y": torch.tensor([1, 2])})
    assert torch.equal(ours, draw(lambda x, t, c: x * 0.1))


def test_a_denoiser_of_the_noise_ratio():
    """The best denoiser of unit normals: x0 = x/(1 + sigma²) is signal·x in our x."""
    signal = torch.tensor(SCHEDULE.signal)

    def model(x, t, c):
        return signal[(t * 1000).round().long()].float().reshape(-1, 1, 1, 1) * x

    table = dx.ddim(SCHEDULE, 5, prediction="x0")
    denoiser = adapters.from_denoiser(
        lambda x, sigma: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2), SCHEDULE
    )
    torch.testing.assert_close(draw(denoiser, table), draw(model, table), rtol=1e-4, atol=1e-5)


def test_guidance_by_any_structure():
    """m_0 + w (m_c - m_0), with zeros or the caller's own in the place of the context."""
    prompt, extra = torch.randn(2, 4), torch.randn(2, 1, 1, 1)

    def model(x, t, c):
        shift = c["prompt"].sum(1).reshape(-1, 1, 1, 1) + c["more"][0]
        assert c["scale"] == 0.1
        return c["scale"] * x + shift

    def guided(null):
        def by_hand(x, t, c):
            m0, mc = model(x, t, null), model(x, t, context)
            return m0 + 3 * (mc - m0)

        return by_hand

    context = {"prompt": prompt, "more": (extra,), "scale": 0.1}
    zeros = {"prompt": 0 * prompt, "more": (0 * extra,), "scale": 0.1}
    null = {"prompt": prompt + 1, "more": (extra - 1,), "scale": 0.1}
    for null_context, meant in ((None, zeros), (null, null)):
        ours = draw(model, context=context, guidance_scale=3, null_context=null_context)
        torch.testing.assert_close(ours, draw(guided(meant)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": {"a": torch.zeros(3, 1)}}, ValueError, "context: wanted 2 rows"),
        ({"context": {"a": 1}}, TypeError, "context: wanted a tensor"),
        (
            {"context": {"y": torch.tensor([1, 2])}, "guidance_scale": 2},
            ValueError,
            "null_context: wanted one for a context of torch.int64",
        ),
        (
            {
                "context": {"y": torch.zeros(2, 1)},
                "guidance_scale": 2,
                "null_context": {"z": torch.zeros(2, 1)},
            },
            ValueError,
            "null_context: wanted the context's structure",
        ),
    ],
)
def test_bad_contexts(options, error, message):
    with pytest.raises(error, match=message):
        draw(lambda x, t, c: x, **options)


def test_a_real_diffusers_model():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    images = draw(adapters.from_diffusers(unet), dx.dpmpp_2m(SCHEDULE, 4, "karras"))
    assert images.isfinite().all()


def test_labels_of_a_network_with_classes():
    seen = []

    def unet(x, timestep, class_labels):
        seen.append(class_labels.tolist())
        return Said(x * 0.1)

    model, labels = adapters.from_diffusers(unet, classes=3), torch.tensor([2, 0])
    x, t = torch.randn(SHAPE), torch.rand(2)
    draw(model, context=labels)
    model(x, t, labels)
    model(x, t, torch.eye(3)[labels])
    assert seen == [[2, 0]] * 6
    draw(model, context=labels, guidance_scale=2)
    assert seen[-1] == [3, 3, 2, 0]


def fused(x, t, **options):
    return Said(x)


CONTEXT_UNET = dx.nn.ContextUnet(3, 8, 2, 8)
X, T, LABELS = torch.zeros(SHAPE), torch.ones(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adapters.from_diffusers(CONTEXT_UNET), TypeError, "model: .* got ContextUnet, wh"),
        (
            lambda: adapters.from_diffusers(dx.nn.ContextUnet),
            TypeError,
            "model: wanted a module or another callable, got the class ContextUnet",
        ),
        (
            lambda: adapters.from_guided_diffusion(adapters.from_diffusers(fused)),
            TypeError,
            "model: wanted a model of another library, got DiffusersModel",
        ),
        (lambda: adapters.from_diffusers("sd"), TypeError, "model: .* got str"),
        (lambda: adapters.from_diffusers(fused, 0), ValueError, "timesteps: wanted at least 1"),
        (lambda: adapters.from_diffusers(fused, classes="a"), TypeError, "classes: wanted an int"),
        (
            lambda: adapters.from_guided_diffusion(fused, SCHEDULE),
            TypeError,
            "timesteps: wanted an int, got NoiseSchedule",
        ),
        (lambda: adapters.from_denoiser(fused, 1000), TypeError, "schedule: wanted a NoiseSched"),
        (lambda: adapters.from_denoiser(3, SCHEDULE), TypeError, "denoiser: wanted a module"),
        (
            lambda: adapters.from_diffusers(fused)(X, T, LABELS),
            TypeError,
            "context: wanted encoder_hidden_states, .* got labels, which want from_diffusers",
        ),
        (
            lambda: adapters.from_diffusers(fused, classes=1)(X, T, LABELS),
            ValueError,
            "context: wanted values from 0 to 0, got 0 to 1",
        ),
        (
            lambda: adapters.from_guided_diffusion(fused)(X, T, LABELS),
            TypeError,
            "context: wanted a dict of the model's keyword arguments, .* got a tensor of .*int64",
        ),
        (
            lambda: adapters.from_denoiser(fused, SCHEDULE)(X, T, "y"),
            TypeError,
            "context: wanted a dict .* got 'y'",
        ),
    ],
)
def test_what_is_no_model_of_another_library(call, error, message):
    with pytest.raises(error, match=message):
        call()
