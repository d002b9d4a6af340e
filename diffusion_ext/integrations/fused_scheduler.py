"""FusedScheduler: what the diffusers schedulers share, their steps as one call of sampler_step."""

from __future__ import annotations

import inspect
import math

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..checks import FLOATING, as_seeds
from ..ops.perturb import perturb_by_table
from ..ops.sampler_step import COLUMNS, sampler_step
from .scheduler_rows import PREDICTIONS, root
from .scheduler_run import Run

OLDEST = (0, 32)  # of diffusers' releases; tests/integrations/test_oldest_diffusers.py runs it
NOISES = ("generator", "counter")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
A0, AH = COLUMNS.index("a0"), COLUMNS.index("ah")


class FusedScheduler:
    """Mixed in before a diffusers scheduler. A subclass says what makes up a run and its rows:

    _held() -> (timesteps, alphas_cumprod, whatever else changes the rows);
    _previous(timesteps [n]) -> int64 [T]; _weights(run, *options) -> float64 [T, 7].
    """

    def __init__(self, *args, noise="generator", exact_coefficients=False, **kwargs):
        if noise not in NOISES:
            raise ValueError(f"noise: wanted one of {NOISES}, got {noise!r}")
        super().__init__(*args, **kwargs)
        self._switch(noise=noise, exact_coefficients=bool(exact_coefficients))
        self._seeds = self._run = None

    def _switch(self, **switches) -> None:
        """Keep switches of ours; the config has those that are on, for diffusers to pass along."""
        defaults = inspect.signature(type(self).__init__).parameters
        for name, value in switches.items():
            setattr(self, name, value)
            if value != defaults[name].default:
                self.register_to_config(**{name: value})

    def set_seeds(self, seeds: int | Tensor | None) -> None:
        """The seeds of the noise under noise="counter".

        Args: seeds: int64 [B], one per sample; an int, whose sample b gets seeds + b; or None, to
            draw them at every step from its generator, else from torch's own.
        Raises: TypeError, ValueError for other seeds, and without noise="counter".
        """
        if self.noise != "counter":
            raise ValueError('set_seeds: wanted a scheduler with noise="counter"')
        if seeds is not None:
            as_seeds(seeds, seeds.numel() if isinstance(seeds, Tensor) else 1, torch.device("cpu"))
        self._seeds = seeds

    # --- noising ----------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t x0 + √(1-ᾱ_t) ε, as diffusers' add_noise, with ᾱ in float32 for every dtype.

        Args: original_samples, noise: [B, *]; timesteps: integers [B], [1] or [].
        Returns: [B, *]. Raises: what diffusers raises.
        """
        fused = self._perturb(original_samples, noise, timesteps)
        if fused is not None:
            return fused[0]
        x, z, dtype = _widened(original_samples, noise)
        return super().add_noise(x, z, timesteps).to(dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t ε - √(1-ᾱ_t) x0, as diffusers' get_velocity, with ᾱ in float32 for every dtype.

        Args: sample, noise: [B, *]; timesteps: integers [B], [1] or [].
        Returns: [B, *]. Raises: what diffusers raises.
        """
        fused = self._perturb(sample, noise, timesteps, velocity=True)
        if fused is not None:
            return fused[1]
        x, z, dtype = _widened(sample, noise)
        return super().get_velocity(x, z, timesteps).to(dtype)

    def _perturb(self, x, noise, timesteps, velocity=False):
        """(x_t, v) of the op; None for what diffusers has to broadcast or to refuse."""
        if not _alike(x, noise) or timesteps.dtype not in INTEGERS or x.dim() == 0:
            return None
        run, batch = self._current_run(), x.shape[0]
        if timesteps.numel() not in (1, batch) or not _within(timesteps, len(run.alpha_bar)):
            return None
        dtype = torch.promote_types(x.dtype, noise.dtype)
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # diffusers takes the roots in float64 for float64 samples, and for those alone.
        alpha_bar = run.alpha_bar.astype(np.float64) if dtype == torch.float64 else run.alpha_bar
        signal, sigma = (
            run.tensor(name, x.device, table_dtype, values)
            for name, values in (
                ("signal", lambda: root(alpha_bar)),
                ("sigma", lambda: root(1 - alpha_bar)),
            )
        )
        t = timesteps.to(x.device, torch.int64).flatten().expand(batch).contiguous()
        return perturb_by_table(x.to(dtype), t, signal, sigma, noise.to(dtype), None, velocity)

    # --- a step -----------------------------------------------------------------------------------

    def _start_run(self, device) -> None:
        """After diffusers' set_timesteps on the host: keep that copy, and move its tensor."""
        # Rounding can give "trailing" one timestep too many, -1, from which there is no step.
        host = self.timesteps[self.timesteps >= 0]
        self.timesteps = host.to(device)
        timesteps = host.numpy().copy()
        self._run = self._new_run(timesteps)

    def _current_run(self) -> Run:
        if self._run is None or not self._run.holds(self._all_held()):
            self._run = self._new_run(self.timesteps.cpu().numpy().copy())
        return self._run

    def _new_run(self, timesteps: np.ndarray) -> Run:
        previous = self._previous(timesteps)
        return Run(self._all_held(), timesteps, previous, self.exact_coefficients)

    def _all_held(self) -> tuple:
        return *self._held(), self.exact_coefficients

    def _clipped(self) -> bool:
        return bool(self.config.thresholding or self.config.clip_sample)

    def _fits(self, model_output, timestep, sample) -> bool:
        """Whether rows can say this step; if not, it is diffusers' to do or to refuse."""
        c = self.config
        return (
            _alike(model_output, sample)
            and sample.dim() > 0
            and _is_timestep(timestep)
            and c.prediction_type in PREDICTIONS
            and (c.thresholding or not c.clip_sample or 0 < c.clip_sample_range < math.inf)
        )

    def _locate(self, run: Run, timestep, sample: Tensor) -> tuple[int | None, Tensor]:
        """(t, its row): t on the host where it is known there, row [] int64 on sample's device."""
        t = run.read(timestep)
        if t is None:
            return None, timestep.reshape(()).to(sample.device, torch.int64)
        run.check(t)
        if run.alpha_bar[t] == 0:
            self._check_signal(t)
        return t, run.rows(sample.device)[t]

    def _check_signal(self, t: int) -> None:
        c = self.config
        if c.prediction_type == "epsilon" and (c.thresholding or not c.clip_sample):
            raise ValueError(
                f"prediction_type: 'epsilon' cannot give x0 at timestep {t}, where alphas_cumprod "
                "is 0 (zero terminal SNR); wanted 'v_prediction' or 'sample', or timesteps "
                "without it"
            )

    def _draw(self, like: Tensor, generator) -> tuple[Tensor | None, Tensor | None]:
        """(noise, None), drawn as diffusers draws it, or (None, seeds [B]) for the kernel."""
        if self.noise == "generator":
            shape, device, dtype = like.shape, like.device, like.dtype
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype), None
        if self._seeds is not None:
            return None, as_seeds(self._seeds, like.shape[0], like.device)
        return None, _draw_seeds(like.shape[0], like.device, generator)

    def _apply(self, run, options, model_output, sample, row, noise, seeds):
        """(x', x0) [B, *] of a row, in the dtype that model_output and sample promote to."""
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        x, m = sample.to(dtype), model_output.to(dtype)
        noise = None if noise is None else noise.to(dtype)
        table, steps = run.table(options, x.device, dtype, self._table_weights)
        if not self.config.thresholding:
            clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
            return sampler_step(x, m, table, steps, row, noise, seeds, clip=clip, return_x0=True)
        # The threshold is a quantile of the whole x0: two passes, the second given x0 as history.
        _, x0 = sampler_step(x, m, table, steps, row, return_x0=True)
        x0 = self._threshold_sample(x0)
        return sampler_step(x, m, table, steps, row, noise, seeds, history=x0), x0

    def _table_weights(self, run, *options) -> np.ndarray:
        rows = self._weights(run, *options)
        if self.config.thresholding:
            rows[:, AH], rows[:, A0] = rows[:, A0].copy(), 0
        return rows


def check_release(version: str) -> None:
    """Raises: ImportError for a release of diffusers older than OLDEST."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"diffusers {version} is older than {oldest}, the oldest that these schedulers are "
            f"tested with: pip install 'diffusers>={oldest}'"
        )


def with_switches(parent: type, **switches):
    """Decorates a scheduler: its constructor takes the parent's arguments, then our switches.

    A config knows the arguments of a class by this signature.

    Raises: ImportError where a method that we replace has other arguments in this diffusers.
    """

    def decorate(scheduler: type) -> type:
        for name in ("step", "set_timesteps", "add_noise", "get_velocity"):
            _check_arguments(getattr(parent, name), getattr(scheduler, name), parent)
        theirs = inspect.signature(parent.__init__).parameters.values()
        ours = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in switches.items()
        ]
        scheduler.__init__.__signature__ = inspect.Signature([*theirs, *ours])
        return scheduler

    return decorate


def _check_arguments(theirs, ours, parent: type) -> None:
    wanted, known = (list(inspect.signature(f).parameters) for f in (theirs, ours))
    if wanted != known:
        raise ImportError(
            f"this release of diffusers has {parent.__name__}.{theirs.__name__}{tuple(wanted)}, "
            f"diffusion_ext knows {tuple(known)}: install another release of one of them"
        )


def _alike(a, b) -> bool:
    """Floating tensors of one shape and device."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.device == b.device and {a.dtype, b.dtype} <= _FLOATING


_FLOATING = frozenset(FLOATING)


def _is_timestep(timestep) -> bool:
    if isinstance(timestep, Tensor):
        return timestep.numel() == 1 and timestep.dtype in INTEGERS
    return hasattr(timestep, "__index__")


def _within(timesteps: Tensor, count: int) -> bool:
    """0 <= timesteps < count, where the host can see them; the kernel traps where it cannot."""
    if timesteps.device.type != "cpu" or timesteps.numel() == 0:
        return True
    least, most = timesteps.aminmax()
    return bool(least >= 0 and most < count)


def _widened(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in at least float32, for diffusers to compute in, and the dtype of the result."""
    dtype = torch.promote_types(x.dtype, noise.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(wide), noise.to(wide), dtype


def _draw_seeds(batch: int, device: torch.device, generator) -> Tensor:
    """Seeds [B] for one step, from a generator, a list of them (one seed each) or torch's own."""
    high = 2**63 - 1
    if isinstance(generator, (list, tuple)) and len(generator) > 1:
        each = [torch.randint(high, (1,), generator=g, device=g.device) for g in generator[:batch]]
        return torch.cat(each).to(device, non_blocking=True)
    if isinstance(generator, (list, tuple)):
        generator = generator[0] if generator else None
    source = device if generator is None else generator.device
    seeds = torch.randint(high, (batch,), generator=generator, device=source)
    return seeds.to(device, non_blocking=True)
