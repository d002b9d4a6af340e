"""Samplers as tables: a sampler is a pure function from a schedule to one row of numbers per step.

Every step of every sampler here is the same arithmetic (x [B,*] the sample, m the model's output,
z normal noise, h the data prediction of the step before):

    x0 = clip(kx·x + km·m)
    x' = ax·x + am·m + a0·x0 + ah·h + az·z

so adding a sampler is writing the weights of x, x0, ε and z in x', from its paper, and nothing
else. The weights are computed in float64; the kernels read them as float32, whatever the sample's
dtype (in half precision the noise of the last steps would vanish).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from .checks import check_clip, check_number, check_schedule
from .schedules import NoiseSchedule, is_lasting

__all__ = ["COLUMNS", "PREDICTIONS", "SPACINGS", "StepTable", "ddim", "ddpm", "spaced_timesteps"]

COLUMNS = ("kx", "km", "ax", "am", "a0", "ah", "az")
PREDICTIONS = ("epsilon", "v", "x0")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: the timesteps and one row of coefficients per step.

    Attributes:
        timesteps: int64 [n], descending; the model sees `timesteps[i]` before step i.
        weights: float64 [n, 7], in the order of `COLUMNS`.
        clip: x0 is clipped to [-clip, clip]; None for no clipping.
        train_timesteps: T of the schedule; the model is given timestep/T.
    """

    timesteps: np.ndarray
    weights: np.ndarray
    clip: float | None
    train_timesteps: int
    _tensors: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("timesteps", "weights"):
            frozen = getattr(self, name).copy()
            frozen.setflags(write=False)
            object.__setattr__(self, name, frozen)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def coefficients(self) -> np.ndarray:
        """float32 [n, 7]: the weights as the kernels read them, whatever the sample's dtype."""
        return self.weights.astype(np.float32)

    def tensors(self, device, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients [n, 7], timesteps int64 [n]) on `device`, copied there once.

        The coefficients are float32, or float64 where the samples' dtype is.
        """
        key = (torch.device(device), dtype == torch.float64)
        if key in self._tensors:
            return self._tensors[key]
        values = self.weights if dtype == torch.float64 else self.coefficients
        tensors = torch.tensor(values, device=device), torch.tensor(self.timesteps, device=device)
        if is_lasting(tensors[0]):
            self._tensors[key] = tensors
        return tensors


def ddpm(schedule: NoiseSchedule, clip: float | None = None, prediction: str = "epsilon"):
    """Ancestral sampling over all T steps (Ho et al. 2020, algorithm 2), σ_t² = β_t.

    The posterior mean is taken as its weights of x0 and x_t (eq. 7), which for an epsilon model
    without clipping is (x - (1-α_t)/√(1-ᾱ_t) ε)/√α_t; no noise is added at t = 1.

    Args:
        schedule: the noise schedule the model was trained with.
        clip: clip the data prediction to [-clip, clip]; None leaves it.
        prediction: what the model predicts: "epsilon", "v" or "x0".

    Returns: StepTable of T rows. Raises: ValueError for bad clip or prediction, and where
    alpha_bar is 0 and the model predicts epsilon.
    """
    check_schedule(schedule)
    t = np.arange(schedule.timesteps, 0, -1)
    beta, alpha_bar = schedule.beta[t], schedule.alpha_bar[t]
    alpha = 1 - beta
    # ᾱ_{t-1}, as ᾱ_t/α_t so that the weights agree with the formula above at t = 1 of every table.
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha_bar_prev = np.where(alpha > 0, alpha_bar / alpha, schedule.alpha_bar[t - 1])
    return _table(
        schedule,
        t,
        x=np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar),
        x0=np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar),
        eps=np.zeros(len(t)),
        z=np.sqrt(beta) * (t > 1),
        clip=clip,
        prediction=prediction,
    )


def ddim(
    schedule: NoiseSchedule,
    steps: int = 20,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
):
    """DDIM on a subsequence of the schedule (Song et al. 2021, eq. 12, σ from eq. 16).

    Args:
        schedule: the noise schedule the model was trained with.
        steps: n, from 1 to T; the last step always lands on index 0, the clean image.
        eta: from 0 (deterministic) to 1 (DDPM's posterior variance).
        spacing: how the n timesteps are chosen, see `spaced_timesteps`.
        clip: clip the data prediction to [-clip, clip], and take ε as what it leaves of x,
            (x - √ᾱ_t x0)/√(1-ᾱ_t); None leaves both as the model has them.
        prediction: what the model predicts: "epsilon", "v" or "x0".

    Returns: StepTable of n rows. Raises: ValueError for an argument out of range, and where
    alpha_bar is 0 and the model predicts epsilon.
    """
    check_schedule(schedule)
    t = spaced_timesteps(schedule.timesteps, steps, spacing)
    return ddim_between(schedule, t, np.append(t[1:], 0), eta, clip, prediction)


def ddim_between(
    schedule: NoiseSchedule,
    t: np.ndarray,
    t_prev: np.ndarray,
    eta: float = 0.0,
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """The rows of DDIM steps from each t to its t_prev (int64 [n] both, 0 <= t_prev < t <= T)."""
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: wanted a number from 0 to 1, got {eta}")
    alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t_prev]
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * np.sqrt(variance)  # eq. 16
    return _table(
        schedule,
        t,
        x=np.zeros(len(t)),
        x0=np.sqrt(alpha_bar_prev),
        eps=np.sqrt(np.maximum(1 - alpha_bar_prev - sigma**2, 0)),
        z=sigma,
        clip=clip,
        prediction=prediction,
    )


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """n of the timesteps 1..T, descending (Lin et al. 2023, table 2).

    "trailing" starts at T and strides T/n; "leading" strides T//n and ends at 1; "linspace" spreads
    evenly from T to 1. Where n divides T, "trailing" is T, T - T/n, ..., T/n.

    Returns: int64 [n]. Raises: ValueError for steps outside 1..T or an unknown spacing.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"steps: wanted an int, got {type(steps).__name__}")
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps: wanted from 1 to {timesteps} (the schedule's T), got {steps}")
    i = np.arange(steps)
    if spacing == "trailing":
        grid = timesteps - i * timesteps / steps
    elif spacing == "leading":
        grid = 1 + (steps - 1 - i) * (timesteps // steps)
    elif spacing == "linspace":
        grid = np.linspace(timesteps, 1, steps)
    else:
        raise ValueError(f"spacing: wanted one of {SPACINGS}, got {spacing!r}")
    return np.round(grid).astype(np.int64)


def _table(schedule, t, *, x, x0, eps, z, clip, prediction) -> StepTable:
    """Rows from the weights (float64 [n] each) of x, x0, ε and z in x'."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: wanted one of {PREDICTIONS}, got {prediction!r}")
    check_clip(clip)
    signal, sigma = schedule.signal[t], schedule.sigma[t]
    if prediction == "epsilon" and (signal == 0).any():
        raise ValueError(
            f"prediction: 'epsilon' cannot give x0 at t = {t[signal == 0][0]}, where alpha_bar "
            "is 0 (zero terminal SNR); wanted a model that predicts 'v' or 'x0'"
        )
    kx, km, ex, em = _predictions(signal, sigma, prediction)
    # Where x0 is beyond float32 it is not to be had; finite weights keep 0·x0 from being NaN.
    kx, km = np.clip(kx, -1e30, 1e30), np.clip(km, -1e30, 1e30)
    if clip is None:  # x0 is linear in x and m: fold it, so that the kernel reads two weights
        ax, am, a0 = x + x0 * kx + eps * ex, x0 * km + eps * em, np.zeros(len(t))
    else:  # ε is what the clipped x0 leaves of x, so that the two still make up x
        ax, am, a0 = x + eps / sigma, np.zeros(len(t)), x0 - eps * signal / sigma
    columns = {"kx": kx, "km": km, "ax": ax, "am": am, "a0": a0, "ah": np.zeros(len(t)), "az": z}
    weights = np.stack([columns[name] for name in COLUMNS], axis=1)
    return StepTable(t, weights, clip, schedule.timesteps)


def _predictions(signal: np.ndarray, sigma: np.ndarray, prediction: str):
    """(kx, km, ex, em), float64 [n] each: x0 = kx·x + km·m and ε = ex·x + em·m.

    x = signal·x0 + sigma·ε; v = signal·ε - sigma·x0 (Salimans & Ho 2022, appendix D).
    """
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, zero, one
    if prediction == "v":
        return signal, -sigma, sigma, signal
    return zero, one, 1 / sigma, -signal / sigma
