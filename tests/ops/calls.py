"""Every op, forward and backward, as a call that can be made again on other inputs.

For what asks the same of each of them: graphs, streams, sanitizers, another device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import TOLERANCE, lay
from torch import Tensor

import diffusion_ext as dx
from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.sampler_step import step_of_row

SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.ddim(SCHEDULE, 10, eta=0.7)
UNGUIDED = dx.unipc(SCHEDULE, 10, order=3)  # four slots, two writes a row
REMEMBERING = dx.guided(UNGUIDED, 2.5)

# (shape, groups) of group_norm_act: on any GPU, these together reach each of its kernels.
NORMS = [
    ((2, 8, 9, 4), 2),  # small
    ((2, 5, 3, 3), 5),  # small, by single elements
    ((1, 16, 64, 64), 1),  # in a cluster where there are clusters
    ((1, 15, 63, 63), 1),
    ((1, 64, 64, 64), 1),  # split, in float32 at least
    ((1, 63, 63, 63), 1),
]


# A loss is a sum, which a CPU adds up by 16 lanes of at most 32 elements and a GPU by threads of at
# most 16. All terms are positive, so that each float32 addition rounds by half a unit in the last
# place at most: 24 units together. These are fewer, since roundings mostly cancel: of 600 losses on
# the emulated GPU 83 differed from the CPU's, by one unit.
LOSS = 4 * 2.0**-23


@dataclass(frozen=True)
class Call:
    """run(**draw()) calls the op: draw makes new inputs, of one shape and layout.

    tolerance: by how much of the largest value a device may differ from another. 0: the bits are a
    contract. Sums are none, since devices add in other orders; in any run of one device they are.
    """

    run: Callable[..., tuple[Tensor, ...]]
    draw: Callable[[], dict[str, Tensor]]
    tolerance: float = 0


def copy_into(inputs: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """The values of others where those of inputs lie."""
    with torch.no_grad():
        for name, tensor in inputs.items():
            tensor.copy_(others[name])


def here(tensor: Tensor) -> Tensor:
    """On the default device. Values are drawn on the CPU: the same ones for every device."""
    return tensor.to(torch.empty(0).device)


def integers(low: int, high: int, *shape: int) -> Tensor:
    return here(torch.randint(low, high, shape, device="cpu"))


def elementwise_calls(dtype, layout, shape) -> dict[str, Call]:
    batch = shape[0]
    double = (2 * batch, *shape[1:])

    def draw(*shape):
        return lay(here(torch.randn(shape, device="cpu").to(dtype)), layout)

    def seeds():
        return integers(-(2**62), 2**62, batch)

    def step(x, m, row, **options):
        out = dx.sampler_step(x, m, *TABLE.tensors(x.device), row, **options)
        return out if isinstance(out, tuple) else (out,)

    def step_in_place(x, m, row, seeds, history):
        out, slots, tensors = x.clone(), history.clone()[None], TABLE.tensors(x.device)
        kernels().sampler_step_(out, m, *tensors, row, None, seeds, slots, None, 1.0)
        return out, slots[0]

    def step_with_slots(x, m, row, seeds, **slots):
        kept = torch.stack([slot.contiguous() for slot in slots.values()])
        tensors = REMEMBERING.tensors(x.device)
        return dx.sampler_step(x, m, *tensors, row, seeds=seeds, clip=0.8, slots=kept), kept

    def step_of_one_row(x, m, seeds, **slots):
        row, timestep = UNGUIDED.tensors(x.device)[0][3], int(UNGUIDED.timesteps[3])
        slots = list(slots.values())
        return step_of_row(x, m, row, timestep, None, seeds, slots, 0.8, True)

    def loss(**inputs):
        return (dx.denoising_loss(schedule=SCHEDULE, prediction="v", **inputs),)

    def loss_backward(model_output, **inputs):
        leaf = model_output.detach().requires_grad_()
        (losses,) = loss(model_output=leaf, delta=0.5, **inputs)
        return torch.autograd.grad(losses, leaf, torch.ones_like(losses))

    def fill(like, seeds):
        out = torch.empty_like(like)
        kernels().philox_normal_(out, seeds, 7, 1)
        return (out,)

    def step_inputs(m_shape=shape, row=(), **more):
        return lambda: {
            "x": draw(*shape),
            "m": draw(*m_shape),
            "row": integers(0, len(TABLE), *row),
            **{name: make() for name, make in more.items()},
        }

    def image():
        return draw(*shape)

    def noising(**source):
        return lambda: {
            "x0": image(),
            "t": integers(0, SCHEDULE.timesteps + 1, batch),
            **{name: make() for name, make in source.items()},
        }

    return {
        "sampler_step": Call(step, step_inputs(noise=image)),
        "sampler_step, guided": Call(
            lambda **inputs: step(guidance=2.5, **inputs), step_inputs(double, seeds=seeds)
        ),
        "sampler_step, history": Call(
            lambda **inputs: step(clip=0.8, return_x0=True, **inputs),
            step_inputs(row=(batch,), seeds=seeds, history=image),
        ),
        "sampler_step, slots": Call(
            step_with_slots,
            step_inputs(double, (batch,), seeds=seeds, **dict.fromkeys("abcd", image)),
        ),
        "sampler_step, one row": Call(
            step_of_one_row,
            lambda: (
                {"x": image(), "m": image(), "seeds": seeds()} | {name: image() for name in "abcd"}
            ),
        ),
        "sampler_step, in place": Call(step_in_place, step_inputs(seeds=seeds, history=image)),
        "perturb": Call(
            lambda **inputs: dx.perturb(schedule=SCHEDULE, target="v", **inputs),
            noising(noise=image),
        ),
        "perturb, seeds": Call(
            lambda **inputs: dx.perturb(schedule=SCHEDULE, **inputs), noising(seeds=seeds)
        ),
        "denoising_loss": Call(loss, noising(model_output=image, seeds=seeds), LOSS),
        "denoising_loss, backward": Call(loss_backward, noising(model_output=image, seeds=seeds)),
        "philox_normal": Call(fill, lambda: {"like": image(), "seeds": seeds()}),
    }


def norm_calls(dtype, layout, shape, groups) -> dict[str, Call]:
    per_sample = ("scale", "shift", "post_scale", "post_shift", "pre_shift")
    sizes = {"weight": shape[1:2], "bias": shape[1:2], **dict.fromkeys(per_sample, shape[:2])}

    def draw():
        inputs = {name: here(torch.randn(s, device="cpu").to(dtype)) for name, s in sizes.items()}
        x, dy = (lay(here(torch.randn(shape, device="cpu").to(dtype)), layout) for _ in range(2))
        return {"x": x, "dy": dy, **inputs}

    def forward(x, dy, **parameters):
        return (dx.group_norm_act(x, groups, **parameters),)

    def both(dy, **inputs):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        y = dx.group_norm_act(num_groups=groups, **leaves)
        return (y.detach(), *torch.autograd.grad(y, tuple(leaves.values()), dy))

    return {
        f"group_norm_act {shape}": Call(forward, draw, 2 * TOLERANCE[dtype]),
        f"group_norm_act {shape}, backward": Call(both, draw, 8 * TOLERANCE[dtype]),
    }


def every_call(dtype, layout, shape=(2, 8, 9, 4)) -> dict[str, Call]:
    """name -> call; `shape` is the elementwise ops'."""
    calls = elementwise_calls(dtype, layout, shape)
    for norm_shape, groups in NORMS:
        calls |= norm_calls(dtype, layout, norm_shape, groups)
    return calls
