"""Which numbers are black and which white: recognised, said, or asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_ext.training import load_data
from diffusion_ext.training.data.value_range import parse_range, recognised_range, to_unit_range

RAMP = np.linspace(0, 1, 2 * 64).reshape(2, 8, 8)

KNOWN = [
    (RAMP, (0, 1)),
    (RAMP.astype(np.float16), (0, 1)),
    (2 * RAMP - 1, (-1, 1)),
    (255 * RAMP, (0, 255)),
    ((255 * RAMP).astype(np.uint8), (0, 255)),
    ((3 * RAMP).astype(np.uint8), (0, 255)),  # dark, but of 8 bits
    ((255 * RAMP).astype(np.int64), (0, 255)),
    ((65535 * RAMP).astype(np.uint16), (0, 65535)),
    ((65535 * RAMP).astype(np.int32), (0, 65535)),
    (RAMP > 0.5, (0, 1)),
]


@pytest.mark.parametrize(("values", "limits"), KNOWN, ids=lambda v: str(getattr(v, "dtype", v)))
def test_ranges_that_the_values_tell(tmp_path, values, limits):
    assert recognised_range(values) == limits
    path = tmp_path / "x.npy"
    np.save(path, values)
    data = load_data(path)
    low, high = limits
    expected = (values.astype(np.float64) - low) / (high - low) * 2 - 1
    torch.testing.assert_close(
        data.images[:, 0].double(), torch.from_numpy(expected), rtol=0, atol=1e-6
    )
    (note,) = data.notes
    assert f"{values.dtype} values from" in note
    assert f"black is taken as {low}, white as {high}" in note


UNCLEAR = [
    RAMP / 2,  # half of 0..1, or the bright half of -1..1
    16 * RAMP,  # as scikit-learn's digits
    (16 * RAMP).astype(np.int64),
    (1023 * RAMP).astype(np.uint16),  # of a camera's 10 bits
    4 * RAMP - 2,  # standardised
    1.2 * RAMP - 0.1,  # resized with a filter that swings
    RAMP - 0.1,
    (255 * RAMP - 128).astype(np.int8),
]


@pytest.mark.parametrize("values", UNCLEAR, ids=lambda v: f"{v.min():g}..{v.max():g} {v.dtype}")
def test_ranges_that_have_to_be_said(tmp_path, values):
    path = tmp_path / "x.npy"
    np.save(path, values)
    with pytest.raises(ValueError, match=r"range: .* do not tell .* say so by \"0,1\""):
        load_data(path)
    low, high = values.min(), values.max()
    images = load_data(path, value_range=f"{low},{high}").images
    assert images.min() == -1
    assert images.max() == 1


def test_what_is_said_goes_before_what_the_values_tell(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, RAMP)
    images = load_data(path, value_range="-1,1").images
    torch.testing.assert_close(images[:, 0].double(), torch.from_numpy(RAMP), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"range: wanted values from 0 to 0.5, got 0 to 1"):
        load_data(path, value_range="0,0.5")


def test_values_a_rounding_beyond_the_range_are_at_its_end():
    unit = to_unit_range(np.array([-1e-7, 1 + 1e-7]), 0, 1)
    assert unit.tolist() == [-1, 1]


@pytest.mark.parametrize("text", ["", "0", "1,0", "0,1,2", "a,b", "0,inf", "nan,1", "full"])
def test_bad_ranges(text):
    with pytest.raises(ValueError, match='range: wanted "auto" or "LOW,HIGH"'):
        parse_range(text)
