"""x86 processors without an fma instruction: the bits are every other's, and no op is slower than
the reference. DIFFUSION_EXT_CPU_CAPABILITY=baseline makes this processor one of them for our
kernels, ATEN_CPU_CAPABILITY=default for torch's and GLIBC_TUNABLES for the C library's."""

import json
import os
import platform
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import diffusion_ext as dx
from diffusion_ext import _C

pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="fma is everywhere"),
]
LACKING = {
    "DIFFUSION_EXT_CPU_CAPABILITY": "baseline",
    "ATEN_CPU_CAPABILITY": "default",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2_Usable,-FMA_Usable,-AVX2,-FMA,-FMA4",
}


def child(code, **environment):
    """What the code prints, as JSON, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def integers(rng, bits, count, exponents=(-3, 3)):
    """float32 whose digits are few, or all, so that sums of them are exact, or half way."""
    digits = rng.integers(-(2**bits), 2**bits, count).astype(np.float32)
    return np.ldexp(digits, rng.integers(*exponents, count)).astype(np.float32)


def operands(count):
    """(a, b, c), float32 [n] each: any bits; sums half way between two float32; subnormal ones."""
    rng = np.random.default_rng(0)
    any_bits = [rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32) for _ in range(3)]
    few = [integers(rng, bits, count) for bits in (6, 5, 9)]
    more = [integers(rng, bits, count, (-8, 8)) for bits in (12, 12, 24)]
    cancelled = [integers(rng, 24, count, (-2, 2)) for _ in range(2)]
    cancelled.append(-(cancelled[0] * cancelled[1]))
    small = [integers(rng, 12, count, at) for at in ((-92, -84), (-72, -60), (-168, -150))]
    # c is odd, and a·b a hair less than half of its last place, which float64 rounds to the half.
    hair = np.ldexp(1.0, -rng.integers(15, 24, count))
    odd = 1 + (2 * rng.integers(0, 2**22, count) + 1) * 2.0**-23
    sign = rng.choice([-1.0, 1.0], (2, count))
    tied = [sign[0] * (1 + hair), 2.0**-24 * (1 - hair), sign[1] * odd]
    # The same below 2^-126, where float32 keeps its distances.
    least = [sign[0] * 2.0**-75 * (1 + hair), 2.0**-75 * (1 - hair)]
    least.append(sign[1] * (2.0**-126 - rng.integers(0, 4, count) * 2.0**-149))
    special = np.float32([0.0, -0.0, 1.0, -1.0, 2.0**-149, 3e38, -3e38, np.inf, -np.inf, np.nan])
    grid = [axis.ravel() for axis in np.meshgrid(special, special, special)]
    cases = (any_bits, few, more, cancelled, small, tied, least, grid)
    with np.errstate(invalid="ignore"):  # a NaN that signals
        return [np.concatenate(parts).astype(np.float32) for parts in zip(*cases, strict=True)]


def nearest(exact: Fraction) -> np.float32:
    """float32, to nearest even."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(exact))
    near = [
        guess,
        np.nextafter(guess, np.float32(np.inf)),
        np.nextafter(guess, -np.float32(np.inf)),
    ]
    finite = [x for x in near if np.isfinite(x)]
    return min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) % 2))


FMA = """
import json, sys
import numpy as np
sys.path.insert(0, {folder!r})
from test_without_fma import operands
from diffusion_ext import _C
y = _C.fma(*operands(20000))
print(json.dumps([_C.has_fma, np.where(np.isnan(y), np.float32(7e37), y).view(np.uint32).tolist()]))
"""


@pytest.fixture(scope="module")
def without():
    code = FMA.format(folder=os.path.dirname(__file__))
    has_fma, bits = child(code, **LACKING)
    assert not has_fma
    return np.array(bits, np.uint32).view(np.float32)


def test_it_is_the_exact_sum_rounded_once(without):
    a, b, c = operands(20000)
    checked = 0
    for i in range(0, len(a), 7):
        if np.isfinite([a[i], b[i], c[i]]).all() and np.isfinite(without[i]):
            exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
            assert without[i] == nearest(exact), (a[i], b[i], c[i])
            checked += 1
    assert checked > 10000


@pytest.mark.skipif(not _C.has_fma, reason="this processor has none to compare with")
def test_it_has_the_instructions_bits(without):
    y = _C.fma(*operands(20000))
    numbers = ~np.isnan(y)
    assert (np.isnan(y) == (without == np.float32(7e37))).all()
    assert (y[numbers].view(np.uint32) == without[numbers].view(np.uint32)).all()


def test_operands_meet_what_is_hard(without):
    """Sums that float64 rounds, sums half way, and subnormal results are among them."""
    with np.errstate(all="ignore"):
        a, b, c = (x.astype(np.float64) for x in operands(20000))
        s = a * b + c
        half_way = (s.view(np.uint64) & 0x1FFFFFFF) == 0x10000000
        lost = (c - (s - a * b)) + (a * b - (s - c))
        rounded_wrongly = np.isfinite(s) & (s.astype(np.float32) != without)
        at_least_normal = np.abs(s.astype(np.float32)) == np.float32(2.0**-126)
        assert (half_way & (lost == 0)).sum() > 1000
        assert (rounded_wrongly & at_least_normal).sum() > 100
        assert rounded_wrongly.sum() > 100
        assert (np.abs(s[np.isfinite(s) & (s != 0)]) < 2.0**-126).sum() > 1000


STEPS = """
import hashlib, json, torch, diffusion_ext as dx
schedule = dx.NoiseSchedule.linear(100)
x, m, z, old = dx.philox_normal(1, (4, 3, 5, 7, 9)).reshape(4, 3, 5, 63)
x.view(-1)[:8] = torch.tensor([0.0, -0.0, 1e-40, -3e-39, 3e38, torch.inf, -torch.inf, torch.nan])
m.view(-1)[4:12] = torch.tensor([0.0, -0.0, 1e-40, -3e-39, 3e38, torch.inf, -torch.inf, torch.nan])
answers = {}
def keep(name, *outputs):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        data = b"".join(
            torch.nan_to_num(o.to(dtype), 7.0, 8.0, -8.0).contiguous().view(torch.uint8).numpy()
            for o in outputs)
        answers[f"{name} {dtype}"] = hashlib.sha256(data).hexdigest()
for name in ("ddpm", "ddim", "dpmpp_2m_sde", "unipc", "heun", "dpm2", "lms", "sa_solver", "lcm"):
    table = getattr(dx, name)(schedule, 10)
    for row in (1, 4):
        slots = table.new_slots(x) if table.slots else None
        if slots is not None:
            slots.copy_(old)
        y, x0 = dx.sampler_step(x, m, table, row, seeds=3, slots=slots, return_x0=True)
        keep(f"{name} {row}", y, x0, *([] if slots is None else slots))
t = torch.tensor([1, 50, 99])
for target in ("noise", "v"):
    keep(f"perturb {target}", *dx.perturb(x, t, schedule, seeds=5, target=target))
    keep(f"given {target}", *dx.perturb(x, t, schedule, noise=z, target=target))
clean = x.nan_to_num(0.0, 1.0, -1.0)
for delta in (None, 0.5):
    out = m.nan_to_num(0.0, 1.0, -1.0).requires_grad_()
    loss = dx.denoising_loss(out, clean, t, schedule, noise=z, prediction="v", delta=delta)
    loss.sum().backward()
    keep(f"loss {delta}", loss.detach(), out.grad)
print(json.dumps(answers))
"""


def test_steps_and_noising_have_the_same_bits():
    best, without = child(STEPS), child(STEPS, **LACKING)
    assert len(best) > 60
    assert {name for name in best if best[name] != without[name]} == set()


SECONDS = """
import json, time, torch, diffusion_ext as dx
torch.set_num_threads(1)
schedule = dx.NoiseSchedule.linear(100)
x, m, seeds = torch.randn(2, 4, 96, 96), torch.randn(2, 4, 96, 96), torch.arange(2)
images = torch.randn(1, 64, 32, 32)
nhwc = images.contiguous(memory_format=torch.channels_last)
ddim, ddpm = dx.ddim(schedule, 10), dx.ddpm(schedule, 10)
calls = {
    "philox_normal": lambda: dx.philox_normal(seeds, x.shape),
    "perturb": lambda: dx.perturb(x, 50, schedule, seeds=seeds),
    "ddim": lambda: dx.sampler_step(x, m, ddim, 5),
    "ddpm": lambda: dx.sampler_step(x, m, ddpm, 5, seeds=seeds),
    "denoising_loss": lambda: dx.denoising_loss(m, x, 50, schedule, seeds=seeds),
    "group_norm_act": lambda: dx.group_norm_act(images, 8),
    "group_norm_act, channels_last": lambda: dx.group_norm_act(nhwc, 8),
    "mish": lambda: dx.group_norm_act(images, 8, act="mish"),
}
seconds = {name: {"native": [], "reference": []} for name in calls}
for turn in range(12):
    for name, call in calls.items():
        for backend, taken in seconds[name].items():
            with dx.use_backend(backend):
                call()
                begin = time.perf_counter()
                call()
                taken.append(time.perf_counter() - begin)
best = {name: {b: min(t) for b, t in of.items()} for name, of in seconds.items()}
print(json.dumps([{op: on["cpu"] for op, on in dx.info().backends.items()}, best]))
"""


def test_no_kernel_is_slower_than_the_reference():
    """Each took at most a third of its time (Zen 4)."""
    served, seconds = child(SECONDS, **LACKING)
    assert served["group_norm_act"] == "native (baseline, 1 threads)"
    assert served["sampler_step"] == "native (baseline, fma by float64, 1 threads)"
    slower = {name: s for name, s in seconds.items() if s["native"] > s["reference"]}
    assert slower == {}


OUTDONE = """
import json, torch, diffusion_ext as dx
from torch import nn
x = torch.randn(2, 8, 4, 4)
layers = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())
dx.fuse(layers)
answers = dx.group_norm_act(x, 4), layers(x)
with dx.use_backend("reference"):
    same = torch.equal(answers[0], dx.group_norm_act(x, 4))
own = nn.functional.group_norm(x, 4, layers[0].weight, layers[0].bias)
same = same and torch.equal(answers[1], nn.functional.silu(own))
print(json.dumps([same, {op: on["cpu"] for op, on in dx.info().backends.items()}]))
"""


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch's are no better"
)
def test_torch_serves_where_its_vector_unit_is_better():
    same, served = child(OUTDONE, DIFFUSION_EXT_CPU_CAPABILITY="baseline")
    unit = torch.backends.cpu.get_cpu_capability()
    assert same
    assert (
        served["group_norm_act"] == f"reference: torch uses {unit} here, and our kernels baseline"
    )
    assert served["perturb"].startswith("native (baseline, ")


def test_no_kernel_calls_the_c_librarys_fma():
    """Every loop has the instruction or float64: a call for each number would take 20 ns."""
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_" in names  # the scan sees something
    assert "fmaf" not in names


def test_fma_says_what_it_wants():
    one = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"a, b: wanted one shape \[n\]"):
        _C.fma(one, np.ones(4, np.float32), one)
    with pytest.raises(ValueError, match=r"c: wanted a's shape \[n\]"):
        _C.fma(one, one, np.ones(4, np.float32))
    assert dx.info().backends["perturb"]["cpu"].startswith("native")
