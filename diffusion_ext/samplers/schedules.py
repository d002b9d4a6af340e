"""Noise schedules: float64 tables of beta and alpha_bar over timesteps 0 (clean data) to T."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..checks import (
    Device,
    as_device,
    check_at_least_0,
    check_at_least_1,
    check_number,
    kind,
    moved,
    numbered,
)
from ..ops.backend import constant_to_compile

__all__ = ["NoiseSchedule"]

MOST_TIMESTEPS = 2**24  # beyond, t/T is no float32 of its own


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variance schedule of a diffusion process: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

    Build one with `linear`, `cosine`, `scaled_linear`, `from_betas` or `course`.

    Attributes:
        beta: float64 [T+1], the variance added at each step (Ho et al. 2020, eq. 2).
        alpha_bar: float64 [T+1], the fraction of signal variance left; `alpha_bar[0]` is 1.
        signal: float64 [T+1], √ᾱ, the factor of x_0 in x_t.
        sigma: float64 [T+1], √(1-ᾱ), the standard deviation of the noise in x_t.
        timesteps: T, the number of noising steps; timesteps run from 1 to T, and 0 is clean data.
    """

    beta: np.ndarray
    alpha_bar: np.ndarray
    signal: np.ndarray = field(init=False, repr=False)
    sigma: np.ndarray = field(init=False, repr=False)
    timesteps: int = field(init=False)
    _tables: dict[tuple[Any, ...], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("beta", "alpha_bar"):
            _check_table(name, getattr(self, name), np.shape(self.beta))
        tables = {
            "beta": self.beta.copy(),
            "alpha_bar": self.alpha_bar.copy(),
            "signal": np.sqrt(self.alpha_bar),
            "sigma": np.sqrt(1.0 - self.alpha_bar),
        }
        for name, table in tables.items():
            table.setflags(write=False)
            object.__setattr__(self, name, table)
        object.__setattr__(self, "timesteps", len(self.alpha_bar) - 1)
        content = hashlib.sha256(self.beta.tobytes() + self.alpha_bar.tobytes())
        object.__setattr__(self, "_digest", content.hexdigest())

    def __getstate__(self) -> dict:
        return {**vars(self), "_tables": {}}  # a file, or a copy, is of no device

    def tensor(self, name: str, device: Device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A table of `values` on `device`, kept there.

        Returns: [T+1] of `dtype`. Raises: TypeError, ValueError for a device that is not here.
        """
        device = numbered(device)
        key = (name, device, dtype)
        if key in self._tables:
            return self._tables[key]
        table = moved(torch.from_numpy(self.values(name).copy()), as_device(device), dtype)
        if is_lasting(table):
            self._tables[key] = table
        return table

    def values(self, name: str) -> np.ndarray:
        """A table by name, float64 [T+1]: "signal", "sigma", "variance" = σ²; "log_level" =
        ln(σ/signal), of the noise levels of Karras et al. 2022; of rectified flow in T steps
        "flow_signal" = 1 - t/T and "flow_sigma" = t/T; "zero", "one". With a "-" before its name,
        its negative.
        """
        if name.startswith("-"):
            return -self.values(name[1:])
        sigma = np.arange(self.timesteps + 1) / self.timesteps
        with np.errstate(divide="ignore"):  # without noise, at t = 0, it is minus infinity
            log_level = np.log(self.sigma / self.signal)
        derived = {
            "log_level": log_level,
            "variance": self.sigma**2,
            "flow_signal": 1 - sigma,
            "flow_sigma": sigma,
            "zero": np.zeros_like(sigma),
            "one": np.ones_like(sigma),
        }
        return derived[name] if name in derived else getattr(self, name)

    def constant(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """What `make` makes of this schedule: a constant to torch.compile, which traces no numpy.

        It compiles again where the arguments, or the numbers of the schedule, are others.

        Args: make: a function of the schedule and the arguments; arguments: constants themselves.
        Returns: make(self, *arguments). Raises: what make raises.
        """
        return self._constant(self._digest, make, *arguments)

    # torch 2.10 and 2.11 take no schedule as an argument of such a function, only as the object of
    # a method, and no torch looks whether that is still the same: the digest tells.
    @constant_to_compile
    def _constant(self, digest: str, make: Callable[..., Any], *arguments: Any) -> Any:
        return make(self, *arguments)

    @classmethod
    def linear(
        cls, timesteps: int = 500, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Linear β over T+1 entries: β_i = β_start + (β_end - β_start) i/T, ᾱ_i = Π_{j<=i} (1-β_j).

        The product starts at j = 0 (so ᾱ_1 = α_0 α_1), and ᾱ_0 is then set to 1. Ho et al.'s
        variant with T entries is `from_betas(np.linspace(beta_start, beta_end, timesteps))`.

        Raises: ValueError for timesteps < 1 or betas outside 0 < β_start <= β_end < 1.
        """
        _check_range(timesteps, beta_start, beta_end)
        beta = beta_start + (beta_end - beta_start) * np.arange(timesteps + 1) / timesteps
        alpha_bar = np.exp(np.cumsum(np.log1p(-beta)))  # the sum of logs does not underflow
        alpha_bar[0] = 1.0
        return cls(beta, alpha_bar)

    @classmethod
    def course(
        cls, timesteps: int = 500, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """`linear`, evaluated in float32 in the order of the course's notebook.

        Bit for bit the table that the published course checkpoints were trained with.

        Raises: ValueError, as `linear`.
        """
        _check_range(timesteps, beta_start, beta_end)
        steps = torch.linspace(0, 1, timesteps + 1, dtype=torch.float32, device="cpu")
        beta = (beta_end - beta_start) * steps + beta_start
        alpha_bar = torch.cumsum((1 - beta).log(), dim=0).exp()
        alpha_bar[0] = 1
        return cls(beta.double().numpy(), alpha_bar.double().numpy())

    @classmethod
    def scaled_linear(
        cls, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """√β linear over T entries (Rombach et al. 2022; Stable Diffusion's defaults).

        Raises: ValueError, as `linear`.
        """
        _check_range(timesteps, beta_start, beta_end)
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2)

    @classmethod
    def cosine(
        cls, timesteps: int = 500, offset: float = 0.008, beta_max: float = 0.999
    ) -> NoiseSchedule:
        """ᾱ_t = f(t)/f(0), f(t) = cos²(π/2 · (t/T + s)/(1 + s)) (Nichol & Dhariwal 2021, eq. 17).

        Args: offset is s; β is clipped at `beta_max`, so that ᾱ_T stays above 0.

        Raises: ValueError for timesteps < 1, offset < 0, and beta_max outside of (0, 1].
        """
        _check_timesteps(timesteps)
        check_at_least_0("offset", offset)
        check_number("beta_max", beta_max)
        if not 0 < beta_max <= 1:
            raise ValueError(f"beta_max: wanted a number in (0, 1], got {beta_max}")
        t = np.arange(timesteps + 1) / timesteps
        f = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], beta_max)
        if not (beta > 0).all():
            raise ValueError(f"offset: wanted one that gives each timestep noise, got {offset}")
        return cls.from_betas(beta)

    @classmethod
    def from_betas(cls, betas: ArrayLike | torch.Tensor) -> NoiseSchedule:
        """From T betas, those of timesteps 1..T: ᾱ_t = Π_{s<=t} (1-β_s) (Ho et al. 2020, eq. 4).

        Args: betas: [T] numbers in (0, 1], as a sequence, array or tensor.

        Raises: TypeError for what is not numbers; ValueError for another shape or range.
        """
        if isinstance(betas, torch.Tensor):
            if betas.layout is not torch.strided or betas.is_complex() or betas.is_meta:
                raise TypeError(f"betas: wanted numbers [T], got {betas.dtype}, {betas.layout}")
            betas = betas.detach().cpu().double().numpy()
        try:
            betas = np.array(betas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"betas: wanted numbers [T], got {type(betas).__name__}") from error
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"betas: wanted shape [T] with T >= 1, got shape {list(betas.shape)}")
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas: wanted values in (0, 1], got from {betas.min()} to {betas.max()}"
            )
        if (betas[:-1] == 1).any():
            raise ValueError("betas: wanted 1 at most as the last, for nothing is left after it")
        beta = np.concatenate(([0.0], betas))
        return cls(beta, np.cumprod(1 - beta))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """This schedule with √ᾱ shifted and scaled so that ᾱ_T = 0 (Lin et al. 2023, algorithm 1).

        At t = T the sample is then pure noise, and an epsilon model says nothing about x_0 there:
        the samplers want prediction "v" or "x0" with it.

        Returns: a new NoiseSchedule. Raises: ValueError where T is 1.
        """
        if self.timesteps < 2:
            raise ValueError("zero_terminal_snr: wanted a schedule with T >= 2, got T = 1")
        first, last = self.signal[1], self.signal[-1]
        signal = (self.signal - last) * first / (first - last)
        signal[0], signal[-1] = 1.0, 0.0
        alpha_bar = signal**2
        beta = np.concatenate(([0.0], 1 - alpha_bar[1:] / alpha_bar[:-1]))
        return type(self)(beta, alpha_bar)


def is_lasting(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be kept for later calls: not one of inference mode or of a tracer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(tensor) is torch.Tensor and not tensor.is_inference()


def check_schedule(schedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule: wanted a NoiseSchedule, got {kind(schedule)}")


def _check_table(name: str, table, shape: tuple[int, ...]) -> None:
    if not isinstance(table, np.ndarray) or table.dtype != np.float64:
        kind = f"{table.dtype} array" if isinstance(table, np.ndarray) else type(table).__name__
        raise TypeError(f"{name}: wanted a float64 array, got {kind}")
    if table.ndim != 1 or len(table) < 2 or table.shape != shape:
        raise ValueError(f"{name}: wanted shape [T+1] with T >= 1, got {list(table.shape)}")
    if not ((table >= 0) & (table <= 1)).all():
        raise ValueError(f"{name}: wanted values in [0, 1], got {table.min()} to {table.max()}")


def _check_timesteps(timesteps: int) -> None:
    check_at_least_1("timesteps", timesteps)
    if timesteps > MOST_TIMESTEPS:
        raise ValueError(f"timesteps: wanted at most {MOST_TIMESTEPS}, got {timesteps}")


def _check_range(timesteps: int, beta_start: float, beta_end: float) -> None:
    _check_timesteps(timesteps)
    check_number("beta_start", beta_start)
    check_number("beta_end", beta_end)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            "beta_start, beta_end: wanted 0 < beta_start <= beta_end < 1, "
            f"got {beta_start} and {beta_end}"
        )
