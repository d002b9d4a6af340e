"""philox_normal: the generator's known answers, the noise contract, and the normals themselves."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import DTYPES, KERNELS, LAYOUTS, SHAPES, assert_close, lay, same_bits

import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels

SEEDS = [3, -5, 2**62]

# Salmon et al.'s known answers: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    native = _C.philox4x32(np.array([counter], np.uint32), np.array([key], np.uint32))
    assert native.tolist() == [expected]
    words = reference.philox4x32(
        [torch.tensor([w]) for w in counter], [torch.tensor([w]) for w in key]
    )
    assert [int(w) for w in words] == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_reference(shape, dtype):
    seeds = torch.tensor(SEEDS[: shape[0]])
    expected = reference.philox_normal(seeds, shape, 5, 1, torch.float64)
    assert_close(dx.philox_normal(seeds, shape, step=5, stream=1, dtype=dtype), expected)


def test_counter_words_of_every_kind():
    """Steps and streams of 32 bits, seeds of 64, each change the noise; the reference agrees."""
    drawn = []
    for seed, step, stream in [(0, 0, 0), (2**32, 0, 0), (0, 2**32 - 1, 0), (0, 0, 2**32 - 1)]:
        seeds = torch.tensor([seed])
        noise = dx.philox_normal(seeds, (1, 100), step=step, stream=stream)
        assert_close(noise, reference.philox_normal(seeds, (1, 100), step, stream, torch.float64))
        drawn.append(noise)
    for i, noise in enumerate(drawn):
        assert all((noise - other).abs().max() > 0.1 for other in drawn[:i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_does_not_depend_on_the_batch(dtype):
    shape, seeds = (3, 4, 9, 11), torch.tensor(SEEDS)
    whole = dx.philox_normal(seeds, shape, step=7, dtype=dtype)
    for b in range(3):
        alone = dx.philox_normal(seeds[b : b + 1], (1, *shape[1:]), step=7, dtype=dtype)
        assert same_bits(whole[b : b + 1], alone)


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2] + [(2, 300, 5, 3)])
def test_noise_does_not_depend_on_the_layout(shape):
    seeds = torch.tensor(SEEDS[: shape[0]])
    expected = dx.philox_normal(seeds, shape)
    for layout in LAYOUTS[1:-1]:  # not "expanded", whose samples share their memory
        out = lay(torch.zeros(shape), layout)
        kernels().philox_normal_(out, seeds, 0, 0)
        assert same_bits(out, expected), layout


def test_a_prefix_of_a_longer_sample():
    """Element e is the same whatever the sample's size: it counts the elements, nothing else."""
    seeds = torch.tensor(SEEDS)
    long, short = dx.philox_normal(seeds, (3, 5000)), dx.philox_normal(seeds, (3, 1237))
    assert same_bits(long[:, :1237], short)


def test_moments_and_tails():
    z = dx.philox_normal(torch.tensor([11]), (1, 1 << 20)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert 4.4 < z.abs().max() < 6.8  # 6.76 is the largest that 32 bits can give
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 4 / n**0.5


@pytest.mark.backends("cpu")
def test_extreme_words():
    """The longest radius and the shortest (u near 0 and near 1) are as exact as the rest."""
    extremes = (0, 1, 2**32 - 1000, 2**32 - 1)
    words = np.array([[r0, r1] for r0 in extremes for r1 in (1, 2**29, 3**19, 2**32 - 1)])
    z = _C.box_muller(words.astype(np.uint32))
    u, angle = (words[:, :1] + 0.5) * 2.0**-32, words[:, 1:] * (2 * np.pi * 2.0**-32)
    radius, direction = np.sqrt(-2 * np.log(u)), np.concatenate([np.cos(angle), np.sin(angle)], 1)
    assert (np.abs(z - radius * direction) <= 3e-7 * radius).all()


def test_int_seed_counts_up():
    seeds = torch.tensor([40, 41, 42])
    counted = dx.philox_normal(40, (3, 10), device=seeds.device)
    assert same_bits(counted, dx.philox_normal(seeds, (3, 10)))


def test_empty():
    for shape in ((0, 4), (2, 0, 3)):
        assert dx.philox_normal(torch.arange(shape[0]), shape).shape == shape


CAPABILITIES = """
import hashlib, torch, diffusion_ext as dx
from diffusion_ext import _C
s = dx.NoiseSchedule.linear(100)
seeds, t = torch.arange(3), torch.tensor([1, 50, 99])
x = dx.philox_normal(7, (3, 5, 9, 11))
outputs = [x, *dx.perturb(x, t, s, seeds=seeds, target="v")]
table = dx.ddim(s, 10, eta=0.5, clip=1.0)
outputs.append(dx.sampler_step(x, outputs[1], *table.tensors("cpu"), torch.tensor([1, 4, 9]),
                               seeds=seeds, clip=1.0))
outputs.append(dx.denoising_loss(x, outputs[2], t, s, seeds=seeds, prediction="v"))
outputs += [o.half() for o in outputs] + [o.bfloat16() for o in outputs]
data = b"".join(o.contiguous().view(torch.uint8).numpy().tobytes() for o in outputs)
print(_C.cpu_capability(), hashlib.sha256(data).hexdigest())
"""


@pytest.mark.backends("cpu")
def test_same_bits_on_every_instruction_set():
    """Noise, perturb, the loss and the update: one set of bits on every instruction set here."""
    answers = {}
    for capability in ("baseline", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", CAPABILITIES],
            env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        )
        used, digest = run.stdout.split()
        answers[used] = digest
    assert "baseline" in answers
    assert len(set(answers.values())) == 1, answers
