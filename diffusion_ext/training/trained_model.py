"""A trained network and what goes with it, as `load_trained` gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import did_you_mean, shown
from ..samplers.schedules import NoiseSchedule

MOST_LISTED = 20  # classes, in a message


@dataclass(frozen=True)
class TrainedModel:
    """A network to sample from, and what a sampler has to know of it.

    Attributes:
        model: the network, on the CPU, in evaluation mode.
        schedule: the noise schedule that it was trained with.
        class_names: of the classes, in the order of their numbers; () of a network without any.
        prediction: what it predicts, which the samplers take as their argument of that name.
        config: the options of its training, as TrainingConfig has them; {} where they are not
            known.
    """

    model: nn.Module
    schedule: NoiseSchedule
    class_names: tuple[str, ...]
    prediction: str = "epsilon"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S), of an image. Raises: ValueError for a network that does not tell."""
        channels, side = (getattr(self.model, name, None) for name in ("in_channels", "height"))
        if not isinstance(channels, int) or not isinstance(side, int):
            kind = type(self.model).__name__
            raise ValueError(f"shape: {kind} has no in_channels and height, which would tell it")
        return channels, side, side

    def labels(self, classes: str | int | Iterable[str | int] | Tensor) -> Tensor:
        """The numbers of classes, as `sample` takes them for its context.

        Args: classes: names, or numbers from 0; a name that is a number is taken for a name first.
        Returns: int64 [n], one for each. Raises: ValueError for a class that there is not.
        """
        classes = classes.tolist() if isinstance(classes, (Tensor, np.ndarray)) else classes
        classes = [classes] if isinstance(classes, (str, Integral)) else classes
        return torch.tensor([self._number_of(one) for one in classes], dtype=torch.int64)

    def _number_of(self, one: str | int) -> int:
        names = self.class_names
        if not names:
            raise ValueError(f"classes: this network has none, got {shown(one)}")
        one = int(one) if isinstance(one, Integral) else one
        if one in names:
            return names.index(str(one))
        if str(one).isdecimal() and int(one) < len(names):
            return int(one)
        listed = sorted(names)[:MOST_LISTED]
        rest = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
        raise ValueError(
            f"classes: wanted {', '.join(listed)}{rest}, or a number from 0 to {len(names) - 1}, "
            f"got {one}{did_you_mean(one, names) if isinstance(one, str) else ''}"
        )
