"""The arguments of `sample`, checked and on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    as_device,
    check_at_least_1,
    check_bool,
    check_dtype,
    check_int,
    check_number,
    check_sizes,
    kind,
    moved,
    networks_of,
    shown,
)
from ..nn.context_unet import UnetForward
from ..ops import philox_normal
from ..ops.layouts import layout_of
from ..samplers import StepTable
from ..samplers.step_table import check_table
from .stepping import Known


def check_options(
    model, table, save_rate, guidance_scale, noise, first_step, callback, **flags: bool
) -> None:
    pipeline = networks_of(model)
    if pipeline or not callable(model) or isinstance(model, type):
        got = kind(model) + pipeline
        raise TypeError(f"model: wanted a module or another callable, got {got}")
    check_table(table)
    if save_rate is not None:
        check_at_least_1("save_rate", save_rate)
    check_number("guidance_scale", guidance_scale)
    if guidance_scale != 1 and table.guidance is not None:
        raise ValueError(
            f"guidance_scale: wanted 1 with a table that has scales (guided), got {guidance_scale}"
        )
    check_int("first_step", first_step)
    if not 0 <= first_step < len(table):
        raise ValueError(f"first_step: wanted from 0 to {len(table) - 1}, got {first_step}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: wanted a callable or None, got {kind(callback)}")
    for name, flag in flags.items():
        check_bool(name, flag)
    if noise is not None and not callable(noise) and not isinstance(noise, torch.Generator):
        raise TypeError(
            "noise: wanted a function of a step's number and its timestep, or a torch.Generator, "
            f"got {kind(noise)} (x_T takes the noise to start from)"
        )


def check_shape(model, shape) -> tuple[int, ...]:
    """(B, C, H, W) as a tuple, that of the images of a model which has such sizes."""
    shape = check_sizes(shape, "(B, C, H, W)")
    if isinstance(model, UnetForward):
        image = (model.in_channels, model.height, model.height)
        if shape[1:] != image:
            wanted = ", ".join(map(str, ("B", *image)))
            raise ValueError(f"shape: wanted ({wanted}), of this model's images, got {shape}")
    return shape


def memory_format_of(model, x_T, shape) -> torch.memory_format:
    """channels_last for images where x_T is, or a convolution's weights are."""
    tensors = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    tensors += [x_T] if isinstance(x_T, Tensor) else []
    if len(shape) == 4 and any(layout_of(t) == torch.channels_last for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def placement(model, x_T, device, dtype) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if device is None:
        there = x_T if parameter is None and isinstance(x_T, Tensor) else parameter
        device = torch.get_default_device() if there is None else there.device
    if dtype is None:
        dtype = torch.float32 if parameter is None else parameter.dtype
    check_dtype(dtype)
    return as_device(device), dtype


def initial(x_T, shape, seeds: Tensor, dtype, device) -> Tensor:
    """x_T [B,C,H,W]: the caller's, or normals of stream 0."""
    if x_T is None:
        return philox_normal(seeds, shape, step=0, stream=0, dtype=dtype)
    if not isinstance(x_T, Tensor):
        raise TypeError(f"x_T: wanted a tensor or None, got {kind(x_T)}")
    if x_T.shape != shape:
        raise ValueError(f"x_T: wanted shape {list(shape)}, got {list(x_T.shape)}")
    return moved(x_T, device, dtype)


def as_known(start, mask, first_step, noise: Tensor, table: StepTable) -> Known | None:
    """The image to start from, checked, in the sample's dtype and device."""
    if start is None:
        if mask is not None or first_step:
            raise ValueError("start: wanted an image for a mask or a first_step, got None")
        return None
    if not isinstance(start, Tensor) or start.shape != noise.shape:
        raise ValueError(f"start: wanted a tensor {list(noise.shape)}, got {shown(start)}")
    if table.levels is None:
        raise ValueError(
            "table: wanted one that knows its noise levels for a start, got levels=None"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or not _broadcasts(mask, noise):
            raise ValueError(
                f"mask: wanted a tensor that broadcasts to {list(noise.shape)}, got {shown(mask)}"
            )
        mask = moved(mask, noise.device, noise.dtype)
    _, levels = table.run_tensors(noise.device, noise.dtype)
    return Known(moved(start, noise.device, noise.dtype), noise, levels, mask)


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    sizes = zip(mask.shape, x.shape, strict=False)
    return mask.dim() == x.dim() and all(m in (1, n) for m, n in sizes)
