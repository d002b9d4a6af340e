"""FusedScheduler: what all our diffusers schedulers share, their switches and their noise."""

from __future__ import annotations

import inspect

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...checks import FLOATING, as_seeds, check_choice, moved

__all__ = ["FusedScheduler", "alike"]


class FusedScheduler:
    """Mixed in before a diffusers scheduler, which is its `theirs`.

    Arguments of its own:
        noise: "generator" draws as diffusers does; "counter" makes the noise in the kernel, from
            the seeds of `set_seeds`.
        exact_coefficients: compute the weights of a step in float64, rounded once, in place of
            diffusers' float32, whose errors of up to 1e-4 a seed's images have in them.
    """

    theirs: type
    noises: tuple[str, ...] = ("generator", "counter")

    def __init__(self, *args, noise="generator", exact_coefficients=False, **kwargs):
        check_choice("noise", noise, self.noises)
        super().__init__(*args, **kwargs)
        self._switch(noise=noise, exact_coefficients=bool(exact_coefficients))
        self._seeds = self._run = None

    def __getstate__(self) -> dict:
        """For copies and pickles: a run is made anew from what diffusers has."""
        return self.__dict__ | {"_run": None}

    @classmethod
    def prepare(cls) -> None:
        """What a subclass's methods take from those of `theirs`."""

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
            raise ValueError(
                f'noise: set_seeds wants a scheduler with noise="counter", got {self.noise!r}'
            )
        if seeds is not None:
            as_seeds(seeds, seeds.numel() if isinstance(seeds, Tensor) else 1, torch.device("cpu"))
        self._seeds = seeds

    def _draw(
        self, like: Tensor, generator, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """(noise, None), drawn as diffusers draws it, or (None, seeds [B]) for the kernel."""
        if self.noise == "generator":
            return _drawn_by_diffusers(like, generator, dtype), None
        if self._seeds is not None:
            return None, as_seeds(self._seeds, like.shape[0], like.device)
        return None, _draw_seeds(like.shape[0], like.device, generator)


def alike(a, b) -> bool:
    """Floating tensors [B, *] of one shape and device."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and ((a.is_cpu and b.is_cpu) or a.device == b.device)  # device makes an object
        and a.dtype in _FLOATING
        and b.dtype in _FLOATING
        and a.dim() > 0
    )


_FLOATING = frozenset(FLOATING)


def _drawn_by_diffusers(like: Tensor, generator, dtype: torch.dtype) -> Tensor:
    """Noise for `like`. Of generators of the CPU it goes to a GPU without a wait, in pinned memory:
    diffusers waits."""
    first = generator[0] if isinstance(generator, list) and generator else generator
    if first is None or not like.is_cuda or first.device.type != "cpu":
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
    noise = randn_tensor(like.shape, generator=generator, device=first.device, dtype=dtype)
    return moved(noise.pin_memory(), like.device)


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
