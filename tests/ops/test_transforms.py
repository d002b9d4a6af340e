"""torch.func's transforms of every op: what torch's autograd, or a loop, gives of the same call."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import diffusion_ext as dx
from diffusion_ext.ops.conv3x3 import conv3x3

SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.ddim(SCHEDULE, 10, eta=0.7, clip=2.0)
T = (3, 50)

pytestmark = pytest.mark.backends("cpu", "reference")
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def norm(x, weight):
    return dx.group_norm_act(x, 4, weight, weight + 1, act="gelu", pre_shift=weight.expand(2, -1))


def perturb(x0, noise):
    return dx.perturb(x0, torch.tensor(T), SCHEDULE, noise, target="v")[0]


def perturb_by_seeds(x0, factor):
    return factor * dx.perturb(x0, torch.tensor(T), SCHEDULE, seeds=torch.tensor([8, 9]))[0]


def loss(output, x0):
    t, seeds = torch.tensor(T), torch.tensor([8, 9])
    return dx.denoising_loss(output, x0, t, SCHEDULE, seeds=seeds, prediction="v", delta=1.0)


def step(x, m):
    tensors = TABLE.tensors(x.device)
    return dx.sampler_step(x, m, *tensors, torch.tensor([2, 7]), noise=m.roll(1), guidance=1.5)


def step_by_seeds(x, m):
    return dx.ddpm_step(x, m, 50, SCHEDULE, seeds=torch.tensor([8, 9]))


def ddim(x, m):
    return dx.ddim_step(x, m, 50, 25, SCHEDULE)


def conv(x, weight):
    return conv3x3(x, weight / 12, None)


def shapes_of(f):
    if f is norm:
        return (2, 16, 4, 4), (16,)
    return ((8, 16, 16, 16), (16, 16, 3, 3)) if f is conv else ((2, 3, 4, 4), (2, 3, 4, 4))


@pytest.fixture(
    params=[norm, perturb, perturb_by_seeds, loss, step, step_by_seeds, ddim, conv],
    ids=lambda f: f.__name__,
)
def function(request, backend):
    return request.param


@pytest.fixture
def inputs(function):
    x, other = (torch.randn(shape) for shape in shapes_of(function))
    return x.contiguous(memory_format=torch.channels_last), other


def autograd_of(function, inputs, dy):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def test_grad_and_vjp(function, inputs):
    y = function(*inputs)
    expected = autograd_of(function, inputs, y)
    close(grad(lambda *a: 0.5 * function(*a).square().sum(), (0, 1))(*inputs), expected)
    primal, pull = vjp(function, *inputs)
    close(primal, y)
    close(pull(y), expected)


def test_jvp_agrees_with_vjp(function, inputs):
    tangents, dy = tuple(torch.randn_like(x) for x in inputs), torch.randn_like(function(*inputs))
    primal, tangent = jvp(function, inputs, tangents)
    close(primal, function(*inputs))
    gradients = autograd_of(function, inputs, dy)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    close((tangent * dy).sum(), along, rtol=1e-3, atol=1e-3)


def test_vmap_is_a_loop(function, inputs):
    batches = tuple(torch.stack([x, 2 * x, -x]) for x in inputs)
    expected = torch.stack([function(*row) for row in zip(*batches, strict=True)])
    close(vmap(function)(*batches), expected)
    per_sample = vmap(grad(lambda *a: function(*a).sum()))(*batches)
    ones = torch.ones_like(expected[0])
    rows = zip(*batches, strict=True)
    close(per_sample, torch.stack([autograd_of(function, r, ones)[0] for r in rows]))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(backend, jacobian):
    x, weight = torch.randn(2, 16, 2, 2), torch.randn(16)
    expected = torch.autograd.functional.jacobian(lambda w: norm(x, w), weight)
    close(jacobian(lambda w: norm(x, w))(weight), expected)


def test_second_derivatives(backend):
    x, weight = torch.randn(2, 16, 2, 2), torch.randn(16)
    energy = lambda w: norm(x, w).square().sum()  # noqa: E731
    close(hessian(energy)(weight), torch.autograd.functional.hessian(energy, weight))


def test_timesteps_rows_and_seeds_may_be_mapped_over(backend):
    x, m, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor(T)
    each = functools.partial(zip, strict=True)

    def noised(x, t, seed):
        return dx.perturb(x[None], t[None], SCHEDULE, seeds=seed[None])[0][0]

    def stepped(x, m, t):
        return dx.ddpm_step(x[None], m[None], t, SCHEDULE, seeds=4)[0]

    def by_row(x, m, row):
        return dx.sampler_step(x[None], m[None], *TABLE.tensors(x.device), row)[0]

    def normals(seed):
        return dx.philox_normal(seed[None], (1, 5))

    for f, args in (
        (noised, (x, t, t)),
        (stepped, (x, m, t)),
        (by_row, (x, m, torch.tensor([1, 9]))),
        (normals, (t,)),
    ):
        close(vmap(f)(*args), torch.stack([f(*row) for row in each(*args)]))


def test_modules_under_vmap_and_per_sample_gradients(backend):
    layer = dx.nn.GroupNormAct(4, 16)
    x = torch.randn(3, 2, 16, 4, 4)
    close(vmap(layer)(x), torch.stack([layer(a) for a in x]))

    network = dx.nn.ContextUnet(3, 16, 5, 8).eval()
    parameters = dict(network.named_parameters())

    def loss(parameters, x, t, c):
        return functional_call(network, parameters, (x[None], t[None], c[None])).square().sum()

    inputs = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5)
    gradients = vmap(grad(loss), (None, 0, 0, 0))(parameters, *inputs)
    network.zero_grad()
    loss(parameters, *(x[0] for x in inputs)).backward()
    for name, parameter in network.named_parameters():
        scale = parameter.grad.abs().max().item()
        close(gradients[name][0], parameter.grad, rtol=1e-3, atol=1e-4 * max(scale, 1))


def test_batched_gradients_of_the_kernels_graph(backend):
    """torch.autograd's own vmap, over a backward of a forward that kernels ran."""
    x, weight = torch.randn(2, 16, 4, 4, requires_grad=True), torch.randn(16)
    y = norm(x, weight)
    rows = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, x, rows, retain_graph=True, is_grads_batched=True)[0]
    single = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]
    close(batched, torch.stack(single))
