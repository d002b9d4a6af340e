"""Image to image, inpainting, and gradients through the sampling loop."""

import pytest
import torch

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)
SHAPE = (2, 3, 8, 8)


def model(x, t, c):
    return torch.tanh(0.7 * x + 0.3 * t.to(x.dtype)[:, None, None, None])


def draw(table, **options):
    return dx.sample(model, SHAPE, table, progress=False, **options).images


def test_start_is_the_image_as_noised_before_that_step():
    table, image, noise = dx.ddim(SCHEDULE, 10), torch.randn(SHAPE), torch.randn(SHAPE)
    seen = []

    def watching(x, t, c):
        seen.append((x.clone(), t[0].item()))
        return model(x, t, c)

    images = dx.sample(
        watching, SHAPE, table, start=image, first_step=6, x_T=noise, progress=False
    ).images
    assert [round(100 * t) for _, t in seen] == [40, 30, 20, 10]
    expected = SCHEDULE.signal[40] * image + SCHEDULE.sigma[40] * noise
    torch.testing.assert_close(seen[0][0], expected.float())
    # The same as the last four steps of a run that has come there by itself.
    x = expected.float()
    for t in (40, 30, 20, 10):
        eps = model(x, torch.full((2,), t / 100), None)
        x = dx.ddim_step(x, eps, t, t - 10, SCHEDULE)
    torch.testing.assert_close(images, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "table",
    [
        dx.ddim(SCHEDULE, 8, eta=1.0),
        dx.dpmpp_2m(SCHEDULE, 8, "karras"),
        dx.flow_euler(8),
        dx.heun(SCHEDULE, 4),
        dx.dpmpp_sde(SCHEDULE, 4),
        dx.unipc(SCHEDULE, 8, order=3),
    ],
)
def test_inpainting_keeps_what_the_mask_leaves(table):
    image, mask = torch.randn(SHAPE), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    steps = []

    def record(i, timestep, x):
        steps.append(x[..., :4].clone())

    images = draw(table, start=image, mask=mask, seeds=3, callback=record)
    torch.testing.assert_close(images[..., :4], image[..., :4], rtol=0, atol=1e-6)
    assert (images[..., 4:] - image[..., 4:]).abs().max() > 0.1
    noise = dx.philox_normal(3, SHAPE)
    for (signal, sigma), kept in zip(table.levels[1:], steps, strict=True):
        expected = signal * image + sigma * noise
        torch.testing.assert_close(kept.double(), expected.double()[..., :4], rtol=0, atol=1e-5)


def test_a_full_mask_changes_nothing():
    table, image = dx.ddim(SCHEDULE, 5), torch.randn(SHAPE)
    options = {"start": image, "first_step": 2, "seeds": 1}
    full = draw(table, mask=torch.ones(1, 1, 8, 8), **options)
    torch.testing.assert_close(full, draw(table, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "table",
    [
        dx.ddim(SCHEDULE, 4, eta=0.5),
        dx.dpmpp_2m(SCHEDULE, 4, clip=2.0),
        dx.ddpm(SCHEDULE),
        dx.heun(SCHEDULE, 3),
        dx.unipc(SCHEDULE, 4, order=3),
    ],
)
def test_gradients_flow_through_the_loop(table, guidance_scale):
    """Of x_T, the context and a weight: those of finite differences; the images are the loop's."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x_T = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def model(x, t, c):
        return torch.tanh(weight * x + c[:, :, None, None] + t[:, None, None, None])

    def loss(weight_, x_T_, context_, **options):
        options |= {"x_T": x_T_, "dtype": torch.float64, "progress": False}
        return dx.sample(model, SHAPE, table, context_, guidance_scale, **options).images

    images = loss(weight, x_T, context, differentiable=True)
    torch.testing.assert_close(images, loss(weight, x_T, context), rtol=0, atol=1e-12)
    direction = torch.randn(SHAPE, dtype=torch.float64)
    gradients = torch.autograd.grad((images * direction).sum(), [weight, x_T, context])
    step = 1e-6
    for leaf, gradient in zip((weight, x_T, context), gradients, strict=True):
        way = torch.randn_like(leaf)
        with torch.no_grad():
            leaf += step * way
            above = (loss(weight, x_T, context) * direction).sum()
            leaf -= 2 * step * way
            below = (loss(weight, x_T, context) * direction).sum()
            leaf += step * way
        expected = (above - below) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), expected, rtol=1e-5, atol=1e-6)


def test_without_being_asked_for_there_are_no_gradients():
    x_T = torch.randn(SHAPE, requires_grad=True)
    assert not draw(dx.ddim(SCHEDULE, 2), x_T=x_T).requires_grad


IMAGE = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 3}, "start: wanted an image for a mask or a first_step, got None"),
        ({"mask": torch.ones(1, 1, 8, 8)}, "start: wanted an image for a mask"),
        ({"start": IMAGE, "first_step": 5}, "first_step: wanted from 0 to 4, got 5"),
        ({"start": IMAGE[:1]}, r"start: wanted a tensor \[2, 3, 8, 8\], got .* \[1, 3, 8, 8\]"),
        ({"start": IMAGE, "mask": torch.ones(8, 8)}, "mask: wanted a tensor that broadcasts"),
        ({"start": IMAGE, "mask": torch.ones(1, 2, 8, 8)}, "mask: wanted a tensor that broadcasts"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        draw(dx.ddim(SCHEDULE, 5), **options)
