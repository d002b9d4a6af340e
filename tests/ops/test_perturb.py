"""perturb: forward noising against the float64 reference and the oracle."""

import pytest
import torch
from harness import DTYPES, LAYOUTS, SHAPES, assert_close, lay, same_bits

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)
TIMES = [0, 57, 100]


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(dtype, shape, layout):
    x0, noise = (lay(torch.randn(shape).to(dtype), layout) for _ in range(2))
    t = torch.tensor(TIMES[: shape[0]])
    for source in ({"noise": noise}, {"seeds": torch.arange(shape[0])}):
        for target in ("noise", "v"):
            x_t, learned = dx.perturb(x0, t, SCHEDULE, target=target, **source)
            wide = {k: double(v) for k, v in source.items()}
            expected = dx.perturb(x0.double(), t, SCHEDULE, target=target, **wide)
            assert_close(x_t, expected[0], dtype)
            assert_close(learned, expected[1], dtype)
            assert x_t.stride() == torch.empty_like(x0).stride()


def test_no_target_is_written_where_none_is_wanted():
    x0, t = torch.randn(3, 2, 5, 7), torch.tensor(TIMES)
    for source in ({"noise": torch.randn_like(x0)}, {"seeds": 3}):
        x_t, target = dx.perturb(x0, t, SCHEDULE, target=None, **source)
        assert target is None
        assert same_bits(x_t, dx.perturb(x0, t, SCHEDULE, **source)[0])


def test_flow_goes_straight_from_image_to_noise():
    x0, noise = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    x_t, _ = dx.perturb(x0, torch.tensor([0, 25, 100]), SCHEDULE, noise, noising="flow")
    assert_close(x_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("noising", "key"), [("standard", "p_xt"), ("course", "p_xt_course")])
def test_oracle(loops, dtype, atol, noising, key):
    x0, noise = (torch.tensor(loops[name], dtype=dtype) for name in ("p_x0", "p_noise"))
    t = torch.tensor(loops["p_t"])
    x_t, target = dx.perturb(x0, t, SCHEDULE, noise=noise, noising=noising)
    torch.testing.assert_close(x_t.double(), torch.tensor(loops[key]), rtol=0, atol=atol)
    assert target is noise


def test_noise_is_the_training_stream():
    x0 = torch.randn(3, 2, 5, 7)
    seeds = torch.tensor([4, 5, 6])
    _, noise = dx.perturb(x0, torch.tensor(TIMES), SCHEDULE, seeds=seeds)
    for b, t in enumerate(TIMES):
        expected = dx.philox_normal(seeds[b : b + 1], (1, 2, 5, 7), step=t, stream=2)
        assert same_bits(noise[b : b + 1], expected)


def test_layouts_give_the_same_bits():
    x0 = torch.randn(3, 6, 9, 7)
    t = torch.tensor(TIMES)
    plain = dx.perturb(x0, t, SCHEDULE, seeds=1, target="v")
    turned = dx.perturb(lay(x0, "channels_last"), t, SCHEDULE, seeds=1, target="v")
    assert all(same_bits(a, b) for a, b in zip(plain, turned, strict=True))


def test_seeds_from_torch_by_default():
    x0, t = torch.randn(2, 3, 4, 4), torch.tensor(TIMES[1:])
    torch.manual_seed(5)
    first, again = (dx.perturb(x0, t, SCHEDULE)[0] for _ in range(2))
    torch.manual_seed(5)
    assert same_bits(first, dx.perturb(x0, t, SCHEDULE)[0])
    assert not torch.equal(first, again)


@pytest.mark.backends("cpu", "cuda")
def test_gradients():
    t = torch.tensor(TIMES)
    x0, noise = (torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x, z: dx.perturb(x, t, SCHEDULE, noise=z, target="v"), (x0, noise)
    )
    x32 = torch.randn(3, 2, 3, requires_grad=True)
    dx.perturb(x32, t, SCHEDULE, seeds=0)[0].sum().backward()
    signal = SCHEDULE.tensor("signal", x32.device)[t].reshape(3, 1, 1)
    assert_close(x32.grad, signal.expand(3, 2, 3), torch.float32)
    noise32 = torch.randn(3, 2, 3, requires_grad=True)  # alone: x0 needs no gradient
    dx.perturb(x32.detach(), t, SCHEDULE, noise=noise32)[0].sum().backward()
    sigma = SCHEDULE.tensor("sigma", x32.device)[t].reshape(3, 1, 1)
    assert_close(noise32.grad, sigma.expand(3, 2, 3), torch.float32)
    ones = torch.ones(3, 2, 3)
    forward = torch.func.jvp(
        lambda x: dx.perturb(x, t, SCHEDULE, seeds=0)[0], (x32.detach(),), (ones,)
    )
    assert_close(forward[1], signal.expand(3, 2, 3), torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape):
    t = torch.ones(shape[0], dtype=torch.int64)
    for out in dx.perturb(torch.zeros(shape), t, SCHEDULE, seeds=0):
        assert out.shape == shape
