"""Steps under torch.compile(fullgraph=True): numbers that change, loops, gradients, inductor."""

import pytest
import torch
import torch._dynamo.testing
from harness import assert_close

import diffusion_ext as dx

pytestmark = [pytest.mark.compiles, pytest.mark.backends("cpu", "cuda")]

SHAPE = (2, 3, 4, 4)


def draw():
    """x, the model's output, seeds, and schedules that nothing has been asked of."""
    schedules = dx.NoiseSchedule.linear(100), dx.NoiseSchedule.cosine(100)
    return torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([1, 2]), schedules


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_a_timestep_that_changes(mode):
    x, m, seeds, schedules = draw()

    def step(x, m, t, schedule):
        return dx.ddpm_step(x, m, t, schedule, seeds=seeds)

    f = compiled(step)
    with mode():
        for schedule in schedules:
            for t in (90, 50, 7, 2, 1, 90):  # the last step adds no noise: a graph of its own
                assert_close(f(x, m, t, schedule), step(x, m, t, schedule))


def test_steps_between_timesteps_that_change():
    x, m, seeds, (schedule, _) = draw()

    def step(x, m, t, t_prev, eta):
        return dx.ddim_step(x, m, t, t_prev, schedule, eta=eta, seeds=seeds)

    f = compiled(step)
    for numbers in ((90, 60, 0.0), (60, 30, 0.0), (60, 20, 0.5), (30, 0, 1.0), (90, 60, 0.0)):
        assert_close(f(x, m, *numbers), step(x, m, *numbers))


def test_a_row_a_clip_and_a_guidance_that_change():
    x, m, seeds, (schedule, _) = draw()
    table = dx.ddim(schedule, 10, eta=0.5)

    def step(x, m, row, **options):
        coefficients, timesteps = table.tensors(x.device)
        return dx.sampler_step(x, m, coefficients, timesteps, row, seeds=seeds, **options)

    f, double = compiled(step), torch.cat([m, 2 * m])
    for i, (guidance, clip) in enumerate([(2.0, 1.0), (3.5, 0.5), (4.0, 0.7)]):
        options = {"guidance": guidance, "clip": clip}
        row = torch.tensor(3 * i)
        assert_close(f(x, double, row, **options), step(x, double, row, **options))


@pytest.mark.parametrize("target", ["noise", "v"])
def test_perturb_with_schedules_that_change(target):
    x, _, _, schedules = draw()

    def noised(x, t, schedule, seeds):
        return dx.perturb(x, t, schedule, seeds=seeds, target=target)

    f = compiled(noised)
    short = dx.NoiseSchedule.linear(30)
    for i, schedule in enumerate((*schedules, short)):
        t = torch.tensor([3, 9 + i])
        for ours, expected in zip(f(x, t, schedule, i), noised(x, t, schedule, i), strict=True):
            assert_close(ours, expected)


def test_a_schedule_of_the_same_numbers_compiles_nothing_anew():
    x, m, seeds, (schedule, other) = draw()
    counter = torch._dynamo.testing.CompileCounter()
    f = compiled(lambda x, schedule: dx.ddpm_step(x, m, 50, schedule, seeds=seeds), counter)
    f(x, schedule)
    f(x, dx.NoiseSchedule.linear(100))
    assert counter.frame_count == 1
    f(x, other)
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loop_of_steps_is_one_graph(dtype):
    x, m, _, schedules = draw()
    x, m = x.to(dtype), m.to(dtype)

    def loop(x, schedule):
        for t in range(100, 0, -20):
            x = dx.ddim_step(x, m * x, t, t - 20, schedule, eta=0.5, noise=m)
        return x

    f = compiled(loop)
    for schedule in schedules:
        assert torch.equal(f(x, schedule), loop(x, schedule))


def test_inductor_and_gradients():
    """Code of inductor's own around the step, forward and backward."""
    x, m, seeds, (schedule, _) = draw()
    weight = torch.tensor(0.3, requires_grad=True)
    t = torch.full((2,), 9, device=x.device)

    def loss(x):
        noisy, target = dx.perturb(x, t, schedule, noise=m)
        x = dx.ddpm_step(noisy, weight * noisy, 9, schedule, noise=m)
        x = dx.ddim_step(x, weight * x, 8, 3, schedule)
        return (x - target).square().sum()

    def sampled(x):
        return dx.ddpm_step(x, weight.detach() * x, 9, schedule, seeds=seeds)

    values = [call(x) for call in (compiled(loss, "inductor"), loss)]
    assert_close(*(torch.autograd.grad(value, weight)[0] for value in values))
    assert_close(*(value.detach() for value in values))
    assert_close(compiled(sampled, "inductor")(x), sampled(x))
