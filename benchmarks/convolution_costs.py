"""Fits what `winograd_is_faster` knows of the two convolutions: diffusion_ext/ops/conv2d.py.

    python -m benchmarks.convolution_costs                                      # half a minute
    DIFFUSION_EXT_CPU_CAPABILITY=avx2 python -m benchmarks.convolution_costs

Both are timed on a sweep of shapes, with as many weights in turn as a network has, so that they
come from beyond the second-level cache. A time is taken to be the sum of what its products, the
bytes of its filters and, by Winograd's algorithm, its tiles' channels take each; nonnegative least
squares of the relative errors give how long. Prints these, and what the choice by them costs over
the choice by the clock.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffusion_ext.ops.conv2d import (
    CHANNELS,
    CPU_CAPABILITY,
    POINTS,
    conv2d,
    direct_filters,
    tiles_of,
    winograd_filters,
    winograd_is_faster,
)

from .device import clock, cpu_name

CHANNEL_PAIRS = ((64, 64), (128, 128), (64, 256), (256, 256), (512, 512), (1024, 512), (320, 16))
IMAGES = (  # batch, side
    (1, 1), (1, 2), (1, 4), (2, 4), (1, 8), (4, 4), (2, 8), (1, 14), (1, 16), (8, 6), (1, 32),
    (8, 16), (4, 32),
)  # fmt: skip
MOST = 2.5e9  # products of a shape
WEIGHTS = 40e6  # bytes of the weights that take turns


@dataclass(frozen=True)
class Shape:
    batch: int
    side: int
    channels: int
    out_channels: int

    @property
    def filters(self) -> int:
        """Pairs of channels that are computed."""
        return self.channels * -(-self.out_channels // CHANNELS) * CHANNELS

    @property
    def tiles(self) -> int:
        return tiles_of(self.batch, self.side, self.side)

    def of_direct(self) -> list[float]:
        """Its products and the bytes of its filters."""
        return [9 * self.filters * self.batch * self.side**2, 4 * 9 * self.filters]

    def of_winograd(self) -> list[float]:
        lanes = self.tiles * (self.channels + self.out_channels)
        return [POINTS * self.filters * self.tiles, 4 * POINTS * self.filters, lanes]


def shapes() -> Iterator[Shape]:
    for (channels, out), (batch, side) in itertools.product(CHANNEL_PAIRS, IMAGES):
        if 9 * batch * side**2 * channels * out <= MOST:
            yield Shape(batch, side, channels, out)


def seconds_of(shape: Shape, lay_out: Callable, seconds: float) -> float:
    """Of a call: the lower quartile of all in so many seconds."""
    of_weight = 36 * shape.channels * shape.out_channels
    count = int(min(12, max(1, WEIGHTS // of_weight)))
    weights = torch.randn(count, shape.out_channels, shape.channels, 3, 3)
    filters = itertools.cycle([lay_out(weight) for weight in weights])
    x = torch.randn(shape.batch, shape.channels, shape.side, shape.side)
    x = x.contiguous(memory_format=torch.channels_last)
    times, end = [], clock() + seconds
    while len(times) < 7 or clock() < end:
        start = clock()
        conv2d(x, next(filters), None, shape.out_channels)
        times.append(clock() - start)
    return sorted(times[2:])[len(times[2:]) // 4]


def fitted(terms: list[list[float]], times: np.ndarray) -> np.ndarray:
    """Nanoseconds of each term, and of a call."""
    from scipy.optimize import nnls

    matrix = np.array([[*term, 1.0] for term in terms])
    factors, _ = nnls(matrix / times[:, None], np.ones(len(times)))
    return factors * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convolution_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=0.12, help="of each shape and algorithm")
    seconds = parser.parse_args().seconds
    every, direct, winograd = list(shapes()), [], []
    for i, shape in enumerate(every, 1):
        direct.append(seconds_of(shape, direct_filters, seconds))
        winograd.append(seconds_of(shape, winograd_filters, seconds))
        if i % 10 == 0 or i == len(every):
            print(f"{i} of {len(every)} shapes", flush=True)
    times = {"DIRECT": np.array(direct), "WINOGRAD": np.array(winograd)}
    terms = {"DIRECT": [s.of_direct() for s in every], "WINOGRAD": [s.of_winograd() for s in every]}
    print(f"{cpu_name()}, kernels for {CPU_CAPABILITY}; nanoseconds of each term, and of a call:")
    for name in times:
        factors = ", ".join(f"{factor:.3g}" for factor in fitted(terms[name], times[name]))
        print(f'{name:8} "{CPU_CAPABILITY}": ({factors})')
    chosen = [
        winograd_is_faster(s.batch, s.side, s.side, s.channels, s.out_channels) for s in every
    ]
    best = np.minimum(*times.values())
    by_choice = np.where(chosen, times["WINOGRAD"], times["DIRECT"])
    for name, taken in {"as they are chosen now": by_choice, **times}.items():
        lost = taken / best - 1
        print(f"{name}: {lost.mean():.1%} over the faster one, at the most {lost.max():.0%}")


if __name__ == "__main__":
    main()
