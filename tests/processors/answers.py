"""What the CPU kernels answer on this processor, into a file: check.py compares them.

    python tests/processors/answers.py FILE.npz

The names say what the answers owe one another: `bits/...` agree to the bit on every processor,
`near/...` but for rounding. Inputs are made of integers, so that no library has rounded them.
"""

import sys

import numpy as np
import torch

import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops.attention import attention_unchecked
from diffusion_ext.ops.conv2d import conv2d, direct_filters, winograd_filters
from diffusion_ext.ops.conv3d import conv3d
from diffusion_ext.ops.group_norm_act import ACTIVATIONS
from diffusion_ext.ops.linear import linear, linear_filters
from diffusion_ext.ops.perturb import perturb_by_table
from diffusion_ext.ops.row_shape import RowShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPE = (3, 5, 33, 31)  # no whole vectors, several tiles
NORMALS = 1 << 22
SCHEDULE = dx.NoiseSchedule.linear(100)
ROW = RowShape(slots=3, writes=2)

rng = np.random.default_rng(0)


def numbers(*shape: int) -> torch.Tensor:
    """Between -2 and 2."""
    return torch.from_numpy(4 * rng.random(shape, np.float32) - 2)


def any_bits(*shape: int) -> torch.Tensor:
    """float32 of every kind: subnormals, infinities and NaNs among them, and zeros of both signs,
    an eighth of each."""
    values = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    kinds = rng.integers(0, 64, shape)
    for kind, value in enumerate((0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 65520.0)):
        values[kinds == kind] = value
    return torch.from_numpy(values)


def seeds(count: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, count, np.int64))


def known_answers():
    words = rng.integers(0, 2**32, (100_000, 6), np.uint32)
    words[0], words[1] = 0, 2**32 - 1
    yield "bits/philox", _C.philox4x32(words[:, :4], words[:, 4:])
    yield "bits/box_muller", _C.box_muller(words[:, :2])


def noise():
    yield "bits/normals", dx.philox_normal(7, (1, NORMALS))
    for dtype in DTYPES:
        yield f"bits/normals/{dtype}", dx.philox_normal(seeds(3), SHAPE, step=9, dtype=dtype)


def halves(dtype):
    """Every half, times what takes it to ties, subnormals and infinity."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    for factor in (1.0, 0.5, 1 / 3, 1 + 2.0**-11, 1 + 2.0**-8, 2.0**-10, 3.0):
        signal, sigma, t = torch.tensor([factor]), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        yield perturb_by_table(x, t, signal, sigma, torch.zeros_like(x))[0]


def table(rows: int) -> torch.Tensor:
    """Rows of any weights, which a sampler's logarithms would round differently elsewhere."""
    weights = numbers(rows, ROW.width)
    for write in range(ROW.writes):
        slots = rng.integers(0, ROW.slots, rows).astype(np.float32)
        weights[:, ROW.slot(write)] = torch.from_numpy(slots)
    return weights


def elementwise(draw, dtype, layout):
    """Steps of a table, forward noising and losses, of what draw makes."""

    def images(batch=SHAPE[0]):
        return draw(batch, *SHAPE[1:]).to(dtype).contiguous(memory_format=layout)

    x, m, z = images(), images(2 * SHAPE[0]), images()
    t, row = torch.tensor([1, 50, 100]), torch.tensor([0, 2, 4])
    slots, timesteps = torch.stack([images() for _ in range(ROW.slots)]), torch.arange(5)
    for given in ({"noise": z}, {"seeds": seeds(3)}):
        for clip in (None, 1.0):
            how = {"clip": clip, "return_x0": True, **given}
            rows = dx.ddpm(SCHEDULE).tensors("cpu")
            yield from dx.sampler_step(x, m, *rows, row, guidance=2.5, **how)
            kept = slots.clone()
            yield from dx.sampler_step(x, m[:3], table(5), timesteps, row, slots=kept, **how)
            yield kept
        for target in ("noise", "v"):
            yield from dx.perturb(x, t, SCHEDULE, target=target, **given)
        for delta in (None, 0.5):
            leaf = m[:3].detach().clone().requires_grad_()
            of = {"x0": x, "prediction": "v", "delta": delta, **given}
            loss = dx.denoising_loss(leaf, t=t, schedule=SCHEDULE, **of)
            yield loss.detach()
            yield torch.autograd.grad(loss.sum(), leaf)[0]


def norms(dtype, layout):
    x = numbers(2, 32, 9, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
    scale, shift = numbers(2, 32).to(dtype), numbers(2, 32).to(dtype)
    for act in ACTIVATIONS:
        y = dx.group_norm_act(x, 4, act=act, scale=scale, shift=shift)
        yield y.detach()
        yield torch.autograd.grad(y.float().square().sum(), x)[0]


def convolutions():
    x = numbers(2, 32, 9, 13).contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(40, 32, 3, 3), numbers(40)
    yield "near/direct", conv2d(x, direct_filters(weight), bias, 40, act="gelu")
    yield "near/winograd", conv2d(x, winograd_filters(weight), bias, 40, act="gelu")
    whole = x.round(), weight.round()  # whose sums are exact in any order
    yield "bits/whole numbers", conv2d(whole[0], direct_filters(whole[1]), None, 40)
    x, weight = numbers(2, 32, 4, 9, 7), numbers(40, 32, 3, 3, 3)
    y = conv3d(x, winograd_filters(weight), bias, 40, act="gelu", contiguous=True)
    yield "near/winograd, moving", y
    whole = x.round(), weight.round()
    yield "bits/whole numbers, moving", conv3d(whole[0], direct_filters(whole[1]), None, 40)


def attentions(dtype):
    """Of heads of less than a vector to several panels, and of two blocks of keys."""
    for size in (5, 40, 64, 72):
        q, k, v = (numbers(1, 2, tokens, size).to(dtype) for tokens in (50, 300, 300))
        yield attention_unchecked(q, k, v, numbers(50, 300) > -1, 0.1, False)


def linear_layers():
    x, weight, bias = numbers(29, 50), numbers(70, 50), numbers(70)
    yield linear(x, linear_filters(weight, gated=True), bias, 35, act="silu", gated=True)
    yield linear(x.round(), linear_filters(weight.round()), None, 70)  # exact sums, as above


def answers():
    yield from known_answers()
    yield from noise()
    for dtype in (torch.float16, torch.bfloat16):
        for i, answer in enumerate(halves(dtype)):
            yield f"bits/halves, {dtype}, {i}", answer
    for dtype in DTYPES:
        for layout in LAYOUTS:
            of = f"{dtype}, {layout}"
            for name, draw in (("numbers", numbers), ("any bits", any_bits)):
                for i, answer in enumerate(elementwise(draw, dtype, layout)):
                    yield f"bits/elementwise, {name}, {of}, {i}", answer
            for i, answer in enumerate(norms(dtype, layout)):
                yield f"near/group_norm_act, {of}, {i}", answer
        for i, answer in enumerate(attentions(dtype)):
            yield f"near/attention, {dtype}, {i}", answer
    yield from convolutions()
    gated, whole = linear_layers()
    yield from (("near/linear", gated), ("bits/linear, whole numbers", whole))


def as_array(answer) -> np.ndarray:
    """Of float32, which holds every half; a NaN is a NaN, whatever its bits."""
    if not isinstance(answer, torch.Tensor):
        return answer
    return torch.where(answer.isnan(), torch.nan, answer.float()).contiguous().numpy()


def main() -> None:
    np.savez(sys.argv[1], **{name: as_array(answer) for name, answer in answers()})


if __name__ == "__main__":
    main()
