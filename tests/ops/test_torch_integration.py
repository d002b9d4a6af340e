"""The ops under torch.library.opcheck, torch.compile(fullgraph=True) and the choice of backend."""

import pytest
import torch
from harness import KERNELS, assert_close

import diffusion_ext as dx
from diffusion_ext.ops.backend import kernels

SCHEDULE = dx.NoiseSchedule.linear(100)


def samples(memory_format=torch.contiguous_format):
    return torch.randn(2, 4, 6, 6).to(memory_format=memory_format)


def op_calls(memory_format):
    """(op, arguments) that cover every schema."""
    ops = kernels()
    x, m, seeds = samples(memory_format), samples(memory_format), torch.tensor([1, 2])
    step = (*dx.ddpm(SCHEDULE).tensors(x.device), torch.tensor(3))
    writing = dx.unipc(SCHEDULE, 5).tensors(x.device)[0][3]
    t, tables = torch.tensor([5, 9]), [SCHEDULE.tensor(n, x.device) for n in ("signal", "sigma")]
    c, nc = torch.randn(4), torch.randn(2, 4)
    modulation = (nc, nc, nc, None, nc)
    _, mean, rstd = ops.group_norm_act(x, 2, c, None, 1e-5, 2, *modulation)
    return [
        (ops.sampler_step, (x, m, *step, None, seeds, None, 1.0, 1.0, True)),
        (ops.sampler_step, (x, torch.cat([m, m]), *step, m, None, m, None, 2.0, False)),
        (ops.sampler_step_, (x.clone(), m, *step, None, seeds, None, None, 1.0)),
        (ops.sampler_step_, (x.clone(), m, *step, None, seeds, m[None].clone(), None, 1.0)),
        (ops.sampler_step_with_slots, (x, m, *step, None, seeds, m[None].clone(), 1.0, 1.0, True)),
        (ops.sampler_step_of_row, (x, m, step[0][3], 3, None, seeds, [m], 1.0, True)),
        (ops.sampler_step_of_row, (x, m, writing, 3, None, None, [m, m, m], None, False)),
        (ops.perturb, (x, t, *tables, None, seeds, 1)),
        (ops.perturb, (x, t, *tables, m, None, 1)),
        (ops.perturb, (x, t, *tables, m, None, 2)),
        (ops.perturb, (x, t, *tables, None, seeds, 0)),
        (ops.denoising_loss, (m, t, *tables, x, None, seeds, tables[0][:2], None)),
        (ops.denoising_loss, (m.half(), t, *tables, None, x, None, None, 0.5)),
        (ops.philox_normal_, (torch.empty_like(x), seeds, 3, 1)),
        (ops.group_norm_act, (x, 2, c, None, 1e-5, 2, *modulation)),
        (ops.group_norm_act_backward, (m, x, mean, rstd, 2, c, None, 2, *modulation)),
    ]


@pytest.mark.compiles
@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format):
    for op, args in op_calls(memory_format):
        torch.library.opcheck(op.default, args)


@pytest.mark.backends(*KERNELS)
def test_what_is_absent_has_no_gradient_not_an_empty_one():
    """Making tensors for nobody takes the host's time."""
    ops, x, none = kernels(), samples(), [None] * 5
    _, mean, rstd = ops.group_norm_act(x, 2, None, None, 1e-5, 2, *none)
    gradients = ops.group_norm_act_backward(x, x, mean, rstd, 2, None, None, 2, *none)
    assert gradients[0].shape == x.shape
    assert gradients[1:] == (None,) * 7


def compiled_calls():
    x, m, seeds = samples(), samples(), torch.tensor([1, 2])
    tensors = dx.ddpm(SCHEDULE).tensors(x.device)
    row, t = torch.tensor(3), torch.tensor([5, 9])
    fresh = dx.NoiseSchedule.linear(100)  # whose tables are first asked for while compiling
    return {
        "sampler_step": (lambda: dx.sampler_step(x * 2, m, *tensors, row, seeds=seeds) + 1),
        "sampler_step with slots": (
            lambda: dx.sampler_step(x * 2, m, *tensors, row, seeds=seeds, slots=m[None] * 2) + 1
        ),
        "ddpm_step": (lambda: dx.ddpm_step(x * 2, m, 40, fresh, seeds=seeds) + 1),
        "ddpm_step of tensors": (lambda: dx.ddpm_step(x * 2, m, t, fresh, noise=m) + 1),
        "ddim_step": (lambda: dx.ddim_step(x * 2, m, 40, 30, fresh, eta=0.5, seeds=seeds) + 1),
        "perturb": (lambda: dx.perturb(x * 2, t, fresh, seeds=seeds, target="v")[0] + 1),
        "perturb of a training step": (lambda: dx.perturb(x * 2, t, fresh)[0].mul(0) + 1),
        "denoising_loss": (lambda: dx.denoising_loss(m * 2, x, t, fresh, seeds=seeds) + 1),
        "philox_normal": (lambda: dx.philox_normal(seeds, (2, 5)) + 1),
        "group_norm_act": (lambda: dx.group_norm_act(x * 2, 2, scale=x[:, :, 0, 0]) + 1),
    }


@pytest.mark.compiles
@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("name", list(compiled_calls()))
def test_compiles_to_one_graph(name):
    call = compiled_calls()[name]
    assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.compiles
@pytest.mark.backends(*KERNELS)
def test_compiled_steps_keep_what_they_are_to_remember():
    x, m, seeds = samples(), samples(), torch.tensor([1, 2])
    table = dx.unipc(SCHEDULE, 5, order=3)
    tensors = table.tensors(x.device)

    def step(x, m, row, slots):
        out = dx.sampler_step(x, m, *tensors, row, seeds=seeds, slots=slots)
        return out + slots.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = table.new_slots(x), table.new_slots(x)
    for row in map(torch.tensor, range(4)):
        assert_close(compiled(x, m, row, ours), step(x, m, row, theirs))
        assert_close(ours, theirs)


@pytest.mark.compiles
@pytest.mark.backends("cpu", "cuda")
def test_compiled_training_of_group_norm_act():
    """One graph through forward and backward, the same gradients; inductor's own code around it."""
    module = dx.nn.GroupNormAct(2, 4, act="gelu")
    x = samples().requires_grad_()

    def gradients(f):
        x.grad = module.weight.grad = None
        (f(x) ** 2).sum().backward()
        return x.grad.clone(), module.weight.grad.clone()

    expected = gradients(module)
    for ours, theirs in zip(
        gradients(torch.compile(module, fullgraph=True)), expected, strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.backends("cpu")
def test_use_backend_chooses_and_restores():
    x = samples()
    native = dx.group_norm_act(x, 2)
    with dx.use_backend("reference"):
        assert dx.ops.current_backend() == "reference"
        with dx.use_backend("native"):
            assert torch.equal(dx.group_norm_act(x, 2), native)
        reference = dx.group_norm_act(x, 2)
    assert dx.ops.current_backend() == "native"
    assert not torch.equal(reference, native)  # other arithmetic: proof that it was not the kernel
    assert_close(reference, native)
    with pytest.raises(ValueError, match="name: wanted one of"):
        dx.use_backend("cuda")


def test_float64_is_served_by_the_reference():
    x = samples().double()
    assert dx.group_norm_act(x, 2).dtype == torch.float64
    assert dx.philox_normal(0, (2, 3), dtype=torch.float64, device=x.device).dtype == torch.float64
