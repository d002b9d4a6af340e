"""Bad input raises ValueError or TypeError that names the argument, before any kernel runs."""

import numpy as np
import pytest
import torch
from harness import EMULATED, KERNELS

import diffusion_ext as dx
from diffusion_ext.ops.backend import kernels

SCHEDULE = dx.NoiseSchedule.linear(10)
X = torch.zeros(2, 4, 3, 3)
TENSORS = dx.ddpm(SCHEDULE).tensors("cpu")
ROW = torch.tensor(0)
T = torch.tensor([1, 10])


def step(x=X, m=X, coefficients=TENSORS[0], timesteps=TENSORS[1], row=ROW, **options):
    return lambda: dx.sampler_step(x, m, coefficients, timesteps, row, **options)


def norm(x=X, groups=2, **options):
    return lambda: dx.group_norm_act(x, groups, **options)


def perturb(x=X, t=T, **options):
    return lambda: dx.perturb(x, t, SCHEDULE, **options)


def loss(output=X, x0=X, t=T, **options):
    return lambda: dx.denoising_loss(output, x0, t, SCHEDULE, **options)


def philox(seeds=0, shape=(2, 3), **options):
    return lambda: dx.philox_normal(seeds, shape, **options)


Q = torch.zeros(2, 3, 5, 4)


def attention(q=Q, k=Q, v=Q, **options):
    return lambda: dx.attention(q, k, v, **options)


def ddim(t, t_prev, **options):
    return lambda: dx.ddim_step(X, X, t, t_prev, SCHEDULE, **options)


BAD = [
    (attention(q=1.0), TypeError, "q: wanted a tensor, got float"),
    (attention(q=Q[0, 0]), ValueError, r"q: wanted .* or \[B, T, d\], got \[5, 4\]"),
    (attention(q=Q[..., :0]), ValueError, "q: wanted heads of at least 1 number, got 0"),
    (attention(k=None), TypeError, "k: wanted a tensor, got NoneType"),
    (attention(k=Q.half()), TypeError, "k: wanted q's dtype torch.float32, got torch.float16"),
    (attention(k=Q[:, :1]), ValueError, r"k: wanted shape \[2, 3, Tk, 4\], got \[2, 1, 5, 4\]"),
    (attention(k=Q[..., :3]), ValueError, r"k: wanted shape \[2, 3, Tk, 4\], got \[2, 3, 5, 3\]"),
    (attention(v=Q[:, :, :4]), ValueError, r"v: wanted shape \[2, 3, 5, dv\], got \[2, 3, 4, 4\]"),
    (attention(mask=[True]), TypeError, "mask: wanted a tensor of bools or .* got list"),
    (attention(mask=torch.ones(5, 5).int()), TypeError, "mask: .* got torch.int32"),
    (attention(mask=torch.ones(3, 5)), ValueError, r"mask: .* \[2, 3, 5, 5\], got \[3, 5\]"),
    (attention(mask=torch.ones(1, 2, 3, 5, 5)), ValueError, r"mask: .* got \[1, 2, 3, 5, 5\]"),
    (attention(scale=float("nan")), ValueError, "scale: wanted a finite number, got nan"),
    (attention(scale="1"), TypeError, "scale: wanted a number, got str"),
    (attention(causal=1), TypeError, "causal: wanted True or False, got int"),
    (step(x=[1.0]), TypeError, "x: wanted a tensor, got list"),
    (step(x=X.int()), TypeError, "x: wanted float16, .* got torch.int32"),
    (step(x=torch.tensor(1.0)), ValueError, r"x: wanted shape \[B, \*\]"),
    (step(x=X.to_sparse()), TypeError, r"x: wanted a dense"),
    (step(m=X[:1]), ValueError, r"model_output: wanted x's shape \[2, 4, 3, 3\], or \[2B"),
    (
        step(m=X.half()),
        TypeError,
        "model_output: wanted x's dtype torch.float32, got torch.float16",
    ),
    (step(coefficients=TENSORS[0][:, :6]), ValueError, r"coefficients: wanted shape \[n, 7\]"),
    (step(coefficients=TENSORS[0].half()), TypeError, "coefficients: wanted dtype torch.float32"),
    (step(timesteps=TENSORS[1][:3]), ValueError, r"timesteps: wanted shape \[10\]"),
    (step(row=torch.tensor(10)), ValueError, "row: wanted values from 0 to 9, got 10 to 10"),
    (step(row=torch.tensor([0, -1])), ValueError, "row: wanted values from 0 to 9, got -1"),
    (step(row=torch.tensor([0, 0, 0])), ValueError, r"row: wanted shape \[\] or \[2\], got \[3\]"),
    (step(row=torch.tensor(0.0)), TypeError, "row: wanted dtype torch.int64"),
    (step(noise=X, seeds=torch.tensor([1, 2])), ValueError, "noise, seeds: wanted one of them"),
    (step(noise=X[:1]), ValueError, "noise: wanted x's shape"),
    (step(noise=X.double()), TypeError, "noise: wanted x's dtype"),
    (step(history=X[..., :2]), ValueError, "history: wanted x's shape"),
    (step(seeds=torch.tensor([1])), ValueError, r"seeds: wanted shape \[2\]"),
    (step(clip=-1), ValueError, "clip: wanted a number above 0 or None, got -1"),
    (step(clip=float("nan")), ValueError, "clip: wanted a finite number"),
    (step(guidance="2"), TypeError, "guidance: wanted a number, got str"),
    (step(row=3), TypeError, "row: wanted an int64 tensor, got int"),
    (step(coefficients=[1.0]), TypeError, "table: wanted a StepTable, such as dx.ddim.* got list"),
    (step(m=X.to("meta")), ValueError, "model_output: wanted a tensor on cpu, got one on meta"),
    (norm(x=torch.zeros(4)), ValueError, r"x: wanted shape \[N, C, \*spatial\], got \[4\]"),
    (norm(x="x"), TypeError, "x: wanted a tensor, got str"),
    (norm(groups=3), ValueError, "num_groups: wanted a divisor of the 4 channels, got 3"),
    (norm(groups=0), ValueError, "num_groups: wanted a divisor"),
    (norm(groups=2.0), TypeError, "num_groups: wanted an int, got float"),
    (norm(eps=0), ValueError, "eps: wanted a number above 0"),
    (norm(eps="small"), TypeError, "eps: wanted a number, got str"),
    (lambda: dx.nn.GroupNormAct(2, 4, 1e-5), ValueError, "act: wanted one of .* got 1e-05"),
    (norm(act="swish"), ValueError, "act: wanted one of .* got 'swish'"),
    (norm(weight=torch.zeros(3)), ValueError, r"weight: wanted shape \[C\] = \[4\], got \[3\]"),
    (norm(bias=torch.zeros(4).int()), TypeError, "bias: wanted float16"),
    (norm(scale=torch.zeros(4)), ValueError, r"scale: wanted shape \[N, C\] = \[2, 4\]"),
    (norm(pre_shift=torch.zeros(1, 4)), ValueError, "pre_shift: wanted shape"),
    (norm(weight=torch.zeros(4, device="meta")), ValueError, "weight: wanted a tensor on cpu"),
    (perturb(t=torch.tensor([1, 11])), ValueError, "t: wanted values from 0 to 10, got 1 to 11"),
    (perturb(t=torch.tensor([-1, 1])), ValueError, "t: wanted values from 0 to 10"),
    (perturb(t=torch.tensor([1])), ValueError, r"t: wanted shape \[\] or \[2\], got \[1\]"),
    (perturb(t=[1, 2]), TypeError, "t: wanted an int64 tensor"),
    (perturb(t=T.float()), TypeError, "t: wanted dtype torch.int64"),
    (perturb(target="x0"), ValueError, "target: wanted one of"),
    (perturb(noising="odd"), ValueError, "noising: wanted one of"),
    (perturb(noise=X, seeds=1), ValueError, "noise, seeds: wanted one of them, got both"),
    (perturb(noise=X[:, :1]), ValueError, "noise: wanted x0's shape"),
    (perturb(seeds="7"), TypeError, "seeds: wanted an int"),
    (perturb(seeds=2**63), ValueError, "seeds: wanted an int of 64 bits"),
    (perturb(target="x0"), ValueError, "target: wanted one of"),
    (loss(), ValueError, "noise, seeds: wanted what perturb was given, got neither"),
    (loss(noise=X, seeds=1), ValueError, "noise, seeds: wanted one of them, got both"),
    (loss(output=X.long(), seeds=1), TypeError, "model_output: wanted float16"),
    (loss(x0=X[:, :1], seeds=1), ValueError, "x0: wanted model_output's shape"),
    (loss(x0=X.half(), seeds=1), TypeError, "x0: wanted model_output's dtype torch.float32"),
    (loss(noise=X[:, :1]), ValueError, "noise: wanted x0's shape"),
    (loss(t=torch.tensor([1, 11]), seeds=1), ValueError, "t: wanted values from 0 to 10, got 1"),
    (loss(seeds=1, prediction="noise"), ValueError, "prediction: wanted one of"),
    (loss(seeds=1, noising="odd"), ValueError, "noising: wanted one of"),
    (loss(seeds=1, delta=-1), ValueError, "delta: wanted a number of at least 0, got -1"),
    (loss(seeds=1, delta=0), ValueError, "delta: wanted a number above 0 or None, got 0"),
    (loss(seeds=torch.tensor([1])), ValueError, r"seeds: wanted shape \[2\]"),
    (philox(shape=()), ValueError, r"shape: wanted \(B, \*\)"),
    (philox(shape=(2, -1)), ValueError, r"shape: wanted \(B, \*\)"),
    (philox(seeds=torch.tensor([1])), ValueError, r"seeds: wanted shape \[2\]"),
    (philox(dtype=torch.int64), TypeError, "dtype: wanted float16"),
    (philox(step=1.5), TypeError, "step: wanted an int, got float"),
    (philox(shape=4), TypeError, r"shape: wanted \(B, \*\), got 4"),
    (lambda: dx.perturb(X, T, "linear"), TypeError, "schedule: wanted a NoiseSchedule, got str"),
    (lambda: dx.ddpm_step(X, X, 1, None), TypeError, "schedule: wanted a NoiseSchedule"),
    (lambda: dx.ddim_step(X, X, 2, 1, None), TypeError, "schedule: wanted a NoiseSchedule"),
    (philox(step=-1), ValueError, "step: wanted from 0"),
    (philox(stream=2**32), ValueError, "stream: wanted from 0"),
    (lambda: dx.ddpm_step(X, X, 0, SCHEDULE), ValueError, "t: wanted from 1 to 10, got 0"),
    (lambda: dx.ddpm_step(X, X, 1.0, SCHEDULE), TypeError, "t: wanted an int"),
    (lambda: dx.ddpm_step(X, X, T + 5, SCHEDULE), ValueError, "t: wanted values from 1 to 10"),
    (lambda: dx.ddpm_step(X, X, T > 1, SCHEDULE), TypeError, "t: wanted dtype torch.int64"),
    (lambda: dx.ddpm_step(X, X, True, SCHEDULE), TypeError, "t: wanted an int64 tensor or an int"),
    (ddim(T, T.clamp(max=9)), ValueError, "t_prev: wanted values below t's"),
    (ddim(T, torch.tensor([0, -1])), ValueError, "t_prev: wanted values from 0 to 9"),
    (ddim(np.array(3), 3), ValueError, "t_prev: wanted from 0 to 2, got 3"),
    (ddim(T, 0, eta=2), ValueError, "eta: wanted a number from 0 to 1, got 2"),
    (ddim(T, "0"), TypeError, "t_prev: wanted an int64 tensor or an int, got str"),
    (lambda: dx.ddpm_step(X, X, T[:1], SCHEDULE), ValueError, r"t: wanted shape \[\] or \[2\]"),
    (lambda: dx.ddpm_step(X, X[:1], 1, SCHEDULE), ValueError, "model_output: wanted x's shape"),
    (lambda: dx.ddpm_step(X, X, 5, SCHEDULE, noise=X[:1]), ValueError, "noise: wanted x's shape"),
    (lambda: dx.ddim_step(X, X, 5, 5, SCHEDULE), ValueError, "t_prev: wanted from 0 to 4, got 5"),
    (lambda: dx.ddim_step(X, X, 5, 4, SCHEDULE, eta=[1]), TypeError, "eta: wanted a number"),
    (lambda: dx.ddim_step(X, X, 5, 4, SCHEDULE, eta=2), ValueError, "eta: wanted a number"),
]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.backends(*KERNELS)
def test_the_kernels_check_for_themselves():
    """Called past the wrappers, an op refuses shapes that it would read out of bounds."""
    ops, x, t = kernels(), torch.zeros(2, 4, 3, 3), torch.tensor([1, 10])
    with pytest.raises(RuntimeError, match="seeds: wanted shape"):
        ops.philox_normal_(x, torch.tensor([1]), 0, 0)
    tables = [SCHEDULE.tensor(name, x.device) for name in ("signal", "sigma")]
    with pytest.raises(RuntimeError, match="upstream: wanted float32"):
        ops.denoising_loss(x, t, *tables, x, None, None, torch.ones(3), None)
    with pytest.raises(RuntimeError, match="x0: wanted the model output's shape"):
        ops.denoising_loss(x, t, *tables, x[..., :1], None, None, None, None)
    with pytest.raises(RuntimeError, match="wanted one of them at least"):
        ops.denoising_loss(x, t, *tables, None, None, None, None, None)
    with pytest.raises(RuntimeError, match="num_groups: wanted a divisor"):
        ops.group_norm_act(x, 3, None, None, 1e-5, 2, None, None, None, None, None)
    with pytest.raises(RuntimeError, match="scale: wanted shape"):
        ops.group_norm_act(x, 2, None, None, 1e-5, 2, x[0, :, 0], None, None, None, None)


# Not on a real GPU: there an index is checked on the device, and a failure ends the process's use
# of it.
@pytest.mark.backends("cpu", *EMULATED)
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_the_kernels_check_the_indices(backend, bad):
    ops, x = kernels(), torch.zeros(2, 4, 3, 3)
    tables = [SCHEDULE.tensor(name, x.device) for name in ("signal", "sigma")]
    wanted = f"t: wanted from 0 to 10, got {bad}" if backend == "cpu" else "t out of range"
    with pytest.raises(RuntimeError, match=wanted):
        ops.perturb(x, torch.tensor([1, bad]), *tables, None, torch.tensor([1, 2]), 1)
    with pytest.raises(RuntimeError, match=wanted):
        ops.denoising_loss(x, torch.tensor([1, bad]), *tables, x, None, None, None, None)
    steps = dx.ddpm(SCHEDULE).tensors(x.device)
    wanted = f"row: wanted from 0 to 9, got {bad}" if backend == "cpu" else "row out of range"
    for row in (torch.tensor(bad), torch.tensor([0, bad])):
        with pytest.raises(RuntimeError, match=wanted):
            ops.sampler_step_(x, x, *steps, row, None, None, None, None, 1.0)
        with pytest.raises(RuntimeError, match=wanted):
            ops.sampler_step(x, x, *steps, row, None, None, None, None, 1.0, True)
