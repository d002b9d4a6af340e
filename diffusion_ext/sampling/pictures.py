"""Pictures of samples: a labelled grid, and the denoising as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 64  # least side of an enlarged image, in pixels
GAP = 6
MARGIN = 16
FONT_SIZE = 16
BACKGROUND, INK = "white", "#333333"
GIF_COLOURS = 64
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 100, 2500


def sample_grid(
    images: Tensor,
    columns: int,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """The images in rows, enlarged, with labels above the columns and beside the rows.

    Args:
        images: [B, C, H, W] in [-1, 1] (values beyond are clipped); C is 1 (grey) or 3 (RGB).
        columns: images in a row.
        column_labels: one for each column. row_labels: one for each row.
        title: a line above it all.

    Raises: ValueError for another shape, or labels that do not fit.
    """
    cells = [_enlarge(pixels) for pixels in _to_uint8(images)]
    if columns < 1:
        raise ValueError(f"columns: wanted at least 1, got {columns}")
    rows = -(-len(cells) // columns)
    _check_labels("column_labels", column_labels, columns)
    _check_labels("row_labels", row_labels, rows)

    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + GAP
    left = MARGIN + max((int(font.getlength(label)) + 2 * GAP for label in row_labels), default=0)
    top = MARGIN + (line + GAP if title else 0) + (line if column_labels else 0)
    width, height = cells[0].width + GAP, cells[0].height + GAP
    size = (left + columns * width - GAP + MARGIN, top + rows * height - GAP + MARGIN)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    draw.text((left, MARGIN), title, INK, font, anchor="lt")
    for column, label in enumerate(column_labels):
        x = left + column * width + (width - GAP) // 2
        draw.text((x, top - GAP), label, INK, font, anchor="ms")
    for row, label in enumerate(row_labels):
        y = top + row * height + (height - GAP) // 2
        draw.text((left - 2 * GAP, y), label, INK, font, anchor="rm")
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        grid.paste(cell, (left + column * width, top + row * height))
    return grid


def save_denoising_animation(
    path: str | Path,
    frames: Tensor,
    timesteps: Sequence[int],
    columns: int,
    column_labels: Sequence[str] = (),
) -> None:
    """A GIF of the samples as they lose their noise, which waits on the last frame.

    Args:
        frames: [F, B, C, H, W] in [-1, 1] (clipped), from noise to images.
        timesteps: [F], written above each frame.
        columns, column_labels: as for `sample_grid`.

    Raises: ValueError where there are no frames.
    """
    if not len(frames):
        raise ValueError("frames: wanted at least one, got none")
    grids = [
        _with_few_colours(sample_grid(frame, columns, column_labels, title=f"t = {timestep}"))
        for frame, timestep in zip(frames, timesteps, strict=True)
    ]
    durations = [FRAME_MILLISECONDS] * (len(grids) - 1) + [LAST_FRAME_MILLISECONDS]
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=durations, loop=0)


def _with_few_colours(picture: Image.Image) -> Image.Image:
    """Without the dithering that Pillow would add, which looks grainy and compresses badly."""
    return picture.quantize(GIF_COLOURS, dither=Image.Dither.NONE)


def _check_labels(name: str, labels: Sequence[str], wanted: int) -> None:
    if labels and len(labels) != wanted:
        raise ValueError(f"{name}: wanted {wanted}, got {len(labels)}")


def _to_uint8(images: Tensor) -> np.ndarray:
    """[B, 1 or 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]"""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(
            f"images: wanted shape [B, 1 or 3, H, W], not empty, got {list(images.shape)}"
        )
    return to_levels(images.expand(-1, 3, -1, -1))


def to_levels(images: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1], clipped -> uint8 [B, H, W, C]"""
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _enlarge(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 3] as a picture at least CELL high, smoothed: tiny images read better so."""
    picture = Image.fromarray(pixels)
    factor = max(1, -(-CELL // picture.height))
    size = (factor * picture.width, factor * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC)
