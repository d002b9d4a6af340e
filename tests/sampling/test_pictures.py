"""Pictures: what is drawn where, and every error message."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_ext.sampling import pictures
from diffusion_ext.sampling.pictures import sample_grid, save_denoising_animation

STEP = pictures.CELL + pictures.GAP


def flat_images(*levels, channels=1):
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, channels, 8, 8)


def pixel_of_cell(grid, row, column, left=pictures.MARGIN, top=pictures.MARGIN):
    half = pictures.CELL // 2
    return grid.getpixel((left + column * STEP + half, top + row * STEP + half))


def test_grid_places_the_images_in_rows():
    grid = sample_grid(flat_images(-1.0, 0.0, 1.0), columns=2)
    assert grid.size == (2 * pictures.MARGIN + 2 * STEP - pictures.GAP,) * 2
    assert pixel_of_cell(grid, 0, 0) == (0, 0, 0)
    assert pixel_of_cell(grid, 0, 1) == (128, 128, 128)
    assert pixel_of_cell(grid, 1, 0) == (255, 255, 255)
    assert grid.getpixel((pictures.MARGIN - 1, pictures.MARGIN)) == (255, 255, 255)
    assert grid.getpixel((pictures.MARGIN, pictures.MARGIN)) == (0, 0, 0)


def test_grid_clips_values_and_keeps_colours():
    image = torch.tensor([-5.0, 0.2, 5.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert pixel_of_cell(sample_grid(image, 1), 0, 0) == (0, 153, 255)


def test_large_images_are_not_enlarged():
    grid = sample_grid(torch.zeros(1, 3, 100, 100), 1)
    assert grid.size == (100 + 2 * pictures.MARGIN,) * 2


def test_labels_and_title_take_room_and_are_drawn():
    images = flat_images(0.0, 0.0)
    plain = sample_grid(images, columns=2)
    labelled = sample_grid(images, 2, column_labels=["a", "b"], row_labels=["cats"], title="t = 3")
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    left, top = labelled.width - plain.width, labelled.height - plain.height
    ink = np.asarray(labelled.convert("L")) < 100
    assert ink[:, :left].any()  # the row's label
    assert ink[:top, left:].any()  # the columns' labels and the title
    assert pixel_of_cell(labelled, 0, 1, left + pictures.MARGIN, top + pictures.MARGIN)[0] == 128


def test_animation_has_every_frame_and_waits_on_the_last(tmp_path):
    frames = torch.stack([flat_images(level, level) for level in (-1.0, 0.0, 1.0)])
    save_denoising_animation(tmp_path / "d.gif", frames, [2, 1, 0], 2, ["a", "b"])
    with Image.open(tmp_path / "d.gif") as animation:
        assert animation.n_frames == 3
        shades, durations = [], []
        for i in range(3):
            animation.seek(i)
            frame = animation.convert("RGB")
            shades.append(frame.getpixel((pictures.MARGIN + 9, frame.height - 30))[0])
            durations.append(animation.info["duration"])
        assert shades == [0, 128, 255]
        assert durations == [100, 100, 2500]
        assert animation.info["loop"] == 0


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 2, 8, 8), {}, r"images: wanted shape \[B, 1 or 3, H, W\].*\[1, 2, 8, 8\]"),
        (torch.zeros(1, 8, 8), {}, r"images: wanted shape .* got \[1, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), {}, r"images: wanted shape .*, not empty, got \[0, 1, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), {"columns": 0}, "columns: wanted at least 1, got 0"),
        (torch.zeros(3, 1, 8, 8), {"column_labels": ["a"]}, "column_labels: wanted 2, got 1"),
        (torch.zeros(3, 1, 8, 8), {"row_labels": ["a"]}, "row_labels: wanted 2, got 1"),
    ],
)
def test_bad_grids(images, options, message):
    with pytest.raises(ValueError, match=message):
        sample_grid(images, **({"columns": 2} | options))


def test_animation_without_frames(tmp_path):
    with pytest.raises(ValueError, match="frames: wanted at least one, got none"):
        save_denoising_animation(tmp_path / "d.gif", torch.zeros(0, 1, 1, 8, 8), [], 1)
