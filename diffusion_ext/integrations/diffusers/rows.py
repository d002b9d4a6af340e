"""diffusers' DDPM and DDIM steps as rows of sampler_step: the weights for every timestep.

They are computed in the dtype of ᾱ and, in float32, in diffusers' order of operations, so that the
numbers are diffusers' own, to the bit: where 1 - ᾱ_t/ᾱ_prev loses digits, so do a seed's images.
In float64 they are exact. Products of them, which no step of diffusers rounds, are in float64.

diffusers counts timesteps from 0 to T-1, each with its ᾱ (its alphas_cumprod); row t of a table is
the step from t, so that a timestep is its own row. The step may lead anywhere: `previous` says
where, with FINAL for the end of the run and UNKNOWN where the run has no such timestep.
"""

from __future__ import annotations

import numpy as np
import torch

from ...ops.sampler_step import COLUMNS
from ...samplers.rows import predictions

__all__ = ["FINAL", "UNKNOWN", "ddim_rows", "ddpm_rows", "log_variances", "next_in_run", "root"]

FINAL, UNKNOWN = -1, -2

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}  # diffusers' name: ours


def next_in_run(timesteps: np.ndarray, count: int) -> np.ndarray:
    """The timestep that follows each of 0..count-1 in a run: int64 [count].

    Of a timestep that occurs twice the first place counts, as in diffusers.
    """
    previous = np.full(count, UNKNOWN)
    for t, after in reversed(list(zip(timesteps, [*timesteps[1:], FINAL], strict=True))):
        if 0 <= t < count:
            previous[t] = max(after, FINAL)
    return previous


def alpha_bar_at(alpha_bar: np.ndarray, previous: np.ndarray, final: float) -> np.ndarray:
    """ᾱ at `previous`: [T], `final` at the end of a run, NaN where that is unknown."""
    as_alpha_bar = alpha_bar.dtype.type
    known = np.where(previous >= 0, alpha_bar[previous], as_alpha_bar(final))
    return np.where(previous == UNKNOWN, as_alpha_bar(np.nan), known)


def ddpm_rows(alpha_bar, previous, variance_type, prediction, clipped) -> np.ndarray:
    """DDPM's posterior (Ho et al. 2020, eq. 7) from every t to previous[t], float64 [T, 7].

    Args:
        alpha_bar: float32 or float64 [T]; previous: int64 [T].
        variance_type: diffusers' name of σ². For a learned one z is taken as already scaled by σ.
        prediction: diffusers' prediction_type. clipped: x0 will be clipped or thresholded.
    """
    with np.errstate(all="ignore"):  # what diffusers leaves Inf or NaN, so do the rows
        alpha_bar_prev = alpha_bar_at(alpha_bar, previous, final=1.0)
        alpha = alpha_bar / alpha_bar_prev
        posterior, beta = _variances(alpha_bar, alpha_bar_prev)
        if variance_type.startswith("learned"):
            sigma = np.ones_like(alpha_bar)
        elif variance_type.startswith("fixed_large"):
            sigma = root(beta)
        else:
            sigma = root(posterior)
            if variance_type == "fixed_small_log" and sigma.dtype == np.float32:
                sigma = torch.exp(0.5 * _log(posterior)).numpy()  # the same, rounded otherwise
        return _rows(
            alpha_bar,
            x=root(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar),
            x0=root(alpha_bar_prev) * beta / (1 - alpha_bar),
            eps=np.zeros_like(alpha_bar),
            z=np.where(np.arange(len(alpha_bar)) > 0, sigma, 0),
            prediction=prediction,
            clipped=clipped,
        )


def log_variances(alpha_bar: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """The bounds of a learned variance, [T, 2]: log β̃_t and log β_t.

    Nichol & Dhariwal 2021, eq. 15, between the steps that the run takes.
    """
    with np.errstate(all="ignore"):
        alpha_bar_prev = alpha_bar_at(alpha_bar, previous, final=1.0)
        return _log(np.stack(_variances(alpha_bar, alpha_bar_prev), axis=1)).numpy()


def root(values: np.ndarray) -> np.ndarray:
    """√values by torch's power, as diffusers takes it: numpy's may differ in the last bit."""
    return (torch.from_numpy(values) ** 0.5).numpy()


def _log(values: np.ndarray) -> torch.Tensor:
    return torch.log(torch.from_numpy(values))


def ddim_rows(alpha_bar, previous, final, eta, prediction, clipped, rederived) -> np.ndarray:
    """DDIM (Song et al. 2021, eq. 12, σ from eq. 16) from every t to previous[t], float64 [T, 7].

    Args:
        alpha_bar: float32 or float64 [T]; previous: int64 [T]; final: ᾱ where the run ends.
        eta: 0 is deterministic, 1 DDPM's posterior variance.
        prediction: diffusers' prediction_type. clipped: x0 will be clipped or thresholded.
        rederived: ε is what the clipped x0 leaves of x; else it is the model's own.
    """
    with np.errstate(all="ignore"):
        alpha_bar_prev = alpha_bar_at(alpha_bar, previous, final)
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * root(variance)
        direction = 1 - alpha_bar_prev - sigma * sigma
        if eta <= 1:  # it cannot be negative, but for rounding; beyond, diffusers' NaN stands
            direction = np.maximum(direction, 0)
        return _rows(
            alpha_bar,
            x=np.zeros_like(alpha_bar),
            x0=root(alpha_bar_prev),
            eps=root(direction),
            z=sigma if eta > 0 else np.zeros_like(sigma),
            prediction=prediction,
            clipped=clipped,
            rederived=rederived,
        )


def _variances(alpha_bar, alpha_bar_prev) -> tuple[np.ndarray, np.ndarray]:
    """(β̃, β), [T] each; β̃ no less than 1e-20, for its logarithm."""
    beta = 1 - alpha_bar / alpha_bar_prev
    return np.maximum((1 - alpha_bar_prev) / (1 - alpha_bar) * beta, 1e-20), beta


def _rows(alpha_bar, *, x, x0, eps, z, prediction, clipped, rederived=False) -> np.ndarray:
    """Rows, float64 [T, 7], from the weights ([T] each) of x, x0, ε and z in x'.

    Without clipping x0 is linear in x and m and is folded into their weights. With it, ε is either
    left as the model has it (linear in x and m too) or re-derived: (x - √ᾱ x0)/√(1-ᾱ).
    """
    signal, sigma = root(alpha_bar), root(1 - alpha_bar)
    signal, sigma, x, x0, eps, z = (w.astype(np.float64) for w in (signal, sigma, x, x0, eps, z))
    kx, km, ex, em = predictions(signal, sigma, PREDICTIONS[prediction])
    if not clipped:
        ax, am, a0 = x + x0 * kx + eps * ex, x0 * km + eps * em, np.zeros_like(x)
    elif rederived:
        ax, am, a0 = x + eps / sigma, np.zeros_like(x), x0 - eps * signal / sigma
    else:
        ax, am, a0 = x + eps * ex, eps * em, x0
    if clipped:  # where ᾱ is 0, ±∞ clips to what a large number does, and 0·∞ is no NaN
        kx, km = np.clip(kx, -1e30, 1e30), np.clip(km, -1e30, 1e30)
    columns = {"kx": kx, "km": km, "ax": ax, "am": am, "a0": a0, "ah": np.zeros_like(x), "az": z}
    return np.stack([columns[name] for name in COLUMNS], axis=1)
