"""denoising_loss: losses and gradients against the float64 reference and what torch writes out."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, SHAPES, assert_close, lay, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_ext as dx
from diffusion_ext.ops.denoising_loss import loss_and_gradient

SCHEDULE = dx.NoiseSchedule.linear(100)
TIMES = [0, 57, 100]
PREDICTIONS = ("epsilon", "v", "x0", "flow")


def losses_and_gradient(output, x0, t, upstream, **options):
    leaf = output.detach().requires_grad_()
    losses = dx.denoising_loss(leaf, x0, t, SCHEDULE, **options)
    return losses, torch.autograd.grad(losses, leaf, upstream.to(losses.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(backend, dtype, shape, layout):
    output, x0, noise = (lay(torch.randn(shape).to(dtype), layout) for _ in range(3))
    t, upstream = torch.tensor(TIMES[: shape[0]]), torch.tensor([0.5, 2.0, 1.0])[: shape[0]]
    sources = ({"noise": noise}, {"seeds": torch.arange(shape[0])})
    for source, prediction, delta in itertools.product(sources, PREDICTIONS, (None, 0.4)):
        options = {"prediction": prediction, "delta": delta}
        losses, gradient = losses_and_gradient(output, x0, t, upstream, **options, **source)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in source.items()}
        exact = losses_and_gradient(output.double(), x0.double(), t, upstream, **options, **wide)
        assert_close(losses, exact[0], torch.float32)
        assert_close(gradient * x0[0].numel(), exact[1] * x0[0].numel(), dtype)
        if backend != "reference":  # autograd's own choice there
            assert gradient.stride() == torch.empty_like(output).stride()


@pytest.mark.parametrize("noising", ["standard", "course", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_is_the_loss_that_torch_writes_out(prediction, noising):
    """With the tables of the schedule, and by a Huber loss of torch's."""
    output, x0, noise = (torch.randn(3, 2, 5, 7, dtype=torch.float64) for _ in range(3))
    t = torch.tensor(TIMES)
    ab = torch.from_numpy(SCHEDULE.alpha_bar.copy()).to(t.device)[t].reshape(3, 1, 1, 1)
    time = t.double().reshape(3, 1, 1, 1) / 100
    signal, sigma = {
        "standard": (ab.sqrt(), (1 - ab).sqrt()),
        "course": (ab.sqrt(), 1 - ab),
        "flow": (1 - time, time),
    }[noising]
    target = {
        "epsilon": noise,
        "v": signal * noise - sigma * x0,
        "x0": x0,
        "flow": noise - x0,
    }[prediction]
    options = {"noise": noise, "prediction": prediction, "noising": noising}
    for delta, loss in ((None, F.mse_loss), (0.7, partial(F.huber_loss, delta=0.7))):
        losses = dx.denoising_loss(output, x0, t, SCHEDULE, delta=delta, **options)
        expected = loss(output, target, reduction="none").mean((1, 2, 3))
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_the_noise_is_that_of_perturb():
    """A model that predicts what perturb added has no loss."""
    x0, t, seeds = torch.randn(3, 2, 5, 7), torch.tensor(TIMES), torch.tensor([4, 5, 6])
    for layout in ("contiguous", "channels_last"):
        x = lay(x0, layout)
        for prediction, target in (("epsilon", "noise"), ("v", "v")):
            _, learned = dx.perturb(x, t, SCHEDULE, seeds=seeds, target=target)
            options = {"seeds": seeds, "prediction": prediction}
            assert (dx.denoising_loss(learned, x, t, SCHEDULE, **options) < 1e-12).all()


def test_one_pass_gives_what_two_give():
    output, x0, t = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7), torch.tensor(TIMES)
    upstream, seeds = torch.tensor([0.5, 2.0, 1.0]), torch.arange(3)
    names = ("-sigma", "signal")
    tables = [SCHEDULE.tensor(name, output.device) for name in names]
    once = loss_and_gradient(output, t, *tables, x0, None, seeds, None, upstream)
    twice = losses_and_gradient(output, x0, t, upstream, seeds=seeds, prediction="v")
    assert same_bits(once[0], twice[0].detach())
    assert_close(once[1], twice[1].double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_output_in_half_precision_beside_data_in_float32(dtype):
    """As autocast has it: nothing of x0 is lost to the output's dtype."""
    output, x0 = torch.randn(3, 4, 9, 8).to(dtype), torch.randn(3, 4, 9, 8)
    t, options = torch.tensor(TIMES), {"seeds": 3, "prediction": "v"}
    for layout in ("contiguous", "channels_last", "misaligned contiguous"):
        of = lay(output, layout), x0
        losses, gradient = losses_and_gradient(*of, t, torch.ones(3), **options)
        exact = losses_and_gradient(of[0].double(), x0.double(), t, torch.ones(3), **options)
        assert_close(losses, exact[0], torch.float32)
        assert_close(gradient * x0[0].numel(), exact[1] * x0[0].numel(), dtype)


def test_a_large_sample_keeps_its_gradient_in_float16():
    """Of a mean over so many elements, it is below what float16 holds until the loss is scaled."""
    output = torch.randn(1, 2**18).half().requires_grad_()
    losses = dx.denoising_loss(output, output.detach(), 57, SCHEDULE, seeds=1)
    (gradient,) = torch.autograd.grad(losses.sum() * 2**16, output)
    seeds = torch.tensor([1])
    noise = dx.philox_normal(seeds, output.shape, step=57, stream=2, dtype=torch.float64)
    assert_close(gradient, (output.double() - noise) / 2, torch.float16)


@pytest.mark.backends("cuda")
def test_a_gradient_in_half_precision_is_scaled_without_float32_copies():
    class Made(TorchDispatchMode):
        """The dtypes of what torch makes of a gradient's size."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == output.shape:
                dtypes.add(out.dtype)
            return out

    dtypes, output = set(), torch.randn(4, 3, 8, 8).bfloat16().requires_grad_()
    losses = dx.denoising_loss(output, output.detach(), 57, SCHEDULE, seeds=1)
    with Made():
        losses.sum().backward()
    assert dtypes == {torch.bfloat16}


def test_a_sample_has_its_loss_in_any_batch():
    output, x0 = torch.randn(5, 3, 33, 37), torch.randn(5, 3, 33, 37)
    t, seeds = torch.tensor([3, 9, 57, 100, 1]), torch.arange(5)
    whole = dx.denoising_loss(output, x0, t, SCHEDULE, seeds=seeds)
    for b in range(5):
        one = slice(b, b + 1)
        alone = dx.denoising_loss(output[one], x0[one], t[one], SCHEDULE, seeds=seeds[one])
        assert same_bits(alone, whole[one])


def test_a_large_loss_is_added_up_exactly_enough():
    """A million squares of one value, which a sum in float32 would round away."""
    output, x0 = torch.full((1, 2**20), 3.001), torch.zeros(1, 2**20)
    loss = dx.denoising_loss(output, x0, 5, SCHEDULE, prediction="x0")
    assert_close(loss, (output.double() ** 2).mean(1), torch.float32, factor=0.1)


def test_what_is_not_finite_shows():
    output, x0 = torch.zeros(3, 8), torch.zeros(3, 8)
    output[0, 3], output[1, 3], output[2, 3] = torch.nan, torch.inf, 1e30
    for delta, last in ((None, torch.inf), (1.0, 1e30 / 8)):
        losses = dx.denoising_loss(output, x0, 5, SCHEDULE, prediction="x0", delta=delta)
        expected = torch.tensor([torch.nan, torch.inf, last])
        torch.testing.assert_close(losses, expected, equal_nan=True)


@pytest.mark.backends("cpu", "cuda")
def test_gradients():
    t, seeds = torch.tensor(TIMES), torch.arange(3)
    output, x0 = (torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def losses(output, x0, **options):
        return dx.denoising_loss(output, x0, t, SCHEDULE, seeds=seeds, **options)

    for options in ({"prediction": "v"}, {"prediction": "flow", "delta": 0.5}):
        assert torch.autograd.gradcheck(lambda m, x, o=options: losses(m, x, **o), (output, x0))
    m32, x32 = output.detach().float().requires_grad_(), x0.detach().float().requires_grad_()
    gradients = torch.autograd.grad(losses(m32, x32, prediction="v").sum(), (m32, x32))
    exact = torch.autograd.grad(losses(output, x0, prediction="v").sum(), (output, x0))
    for ours, theirs in zip(gradients, exact, strict=True):
        assert_close(ours, theirs, torch.float32)


@pytest.mark.backends("cpu", "cuda")
def test_a_gradient_has_a_gradient():
    output, x0 = torch.randn(3, 2, 3, requires_grad=True), torch.randn(3, 2, 3)
    losses = dx.denoising_loss(output, x0, torch.tensor(TIMES), SCHEDULE, seeds=1)
    (first,) = torch.autograd.grad(losses.sum(), output, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), output)
    assert_close(second, torch.full_like(second, 2 / 6).double(), torch.float32)


def test_empty():
    t, none = torch.ones(0, dtype=torch.int64), torch.zeros(0, 3)
    assert dx.denoising_loss(none, none, t, SCHEDULE, seeds=0).shape == (0,)
    nothing = torch.zeros(2, 0, 4)  # the mean of no elements is NaN, as torch's
    losses, gradient = losses_and_gradient(nothing, nothing, 5, torch.ones(2), seeds=0)
    assert losses.isnan().all()
    assert gradient.shape == nothing.shape
