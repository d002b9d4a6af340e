"""The options of the sampler that draws a run's pictures, and what they are by default."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Literal

from ..samplers import SAMPLERS, SPACINGS, StepTable, ddpm, flow_euler, flow_heun
from ..training import TrainedModel
from ..training.preview import FEW_STEPS

FLOW_SAMPLERS = {"flow_euler": flow_euler, "flow_heun": flow_heun}
Sampler = Literal[("ddpm", *SAMPLERS, *FLOW_SAMPLERS)]
Spacing = Literal[SPACINGS]
STEPS = 25
# The preview's: docs/samplers.md has it measured on networks that `train` trained.
RECOMMENDED = {"sampler": "dpmpp_2m_sde", "clip": 1.0}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How samples are drawn."""

    sampler: Sampler | None = None
    """docs/samplers.md tells them apart; ddpm takes all T steps; default dpmpp_2m_sde, flow_euler
    for a network of a flow, ddim for the course's"""
    steps: int | None = None
    """steps of all but ddpm, default 25, and 10 of the default dpmpp_2m_sde; some call the model
    twice in each"""
    spacing: Spacing | None = None
    """how the steps lie between noise and image; default the sampler's own"""
    eta: float | None = None
    """how much noise the steps add, of the samplers that have a choice; default the sampler's own,
    0 for ddim"""
    clip: float | None = None
    """clip the predicted image to this on either side; default 1.0 of the default dpmpp_2m_sde"""
    guidance: float = 2.0
    """classifier-free guidance scale; 1 is none"""
    seed: int = 0
    """of the first sample; the others count up from it"""

    def chosen(self, trained: TrainedModel) -> SamplerOptions:
        """These options, with those that are left open as they suit a network."""
        most = trained.schedule.timesteps
        default = {"sampler": "ddim", "steps": min(STEPS, most)}
        if trained.prediction == "flow":
            default = {"sampler": "flow_euler", "steps": STEPS}
        elif self.sampler is None and trained.config.get("noising") == "standard":
            default = RECOMMENDED | {"steps": min(FEW_STEPS, most)}
        open_ones = {name: v for name, v in default.items() if getattr(self, name) is None}
        return replace(self, **open_ones)

    def table(self, trained: TrainedModel) -> StepTable:
        """The sampler of a trained network. Raises: ValueError for an option it has not."""
        own, prediction = self.chosen(trained), trained.prediction
        flow, name = prediction == "flow", own.sampler
        if flow != (name in FLOW_SAMPLERS):
            wanted = f"one of {tuple(FLOW_SAMPLERS)}" if flow else "one that is not for flows"
            raise ValueError(
                f"sampler: wanted {wanted} for a network that predicts {prediction}, got {name}"
            )
        if name == "ddpm":
            return ddpm(trained.schedule, own.clip, prediction)
        make = FLOW_SAMPLERS[name] if flow else SAMPLERS[name]
        wanted = {"spacing": own.spacing, "eta": own.eta}
        options = {name: value for name, value in wanted.items() if value is not None}
        for option in options.keys() - inspect.signature(make).parameters.keys():
            raise ValueError(f"{option}: {name} has no choice of it, got {options[option]}")
        if flow:
            return make(own.steps, clip=own.clip)
        return make(trained.schedule, own.steps, clip=own.clip, prediction=prediction, **options)

    def record(self, trained: TrainedModel) -> dict:
        """What draws the samples of a network, as JSON has it."""
        own = self.chosen(trained)
        return {name: getattr(own, name) for name in SamplerOptions.__dataclass_fields__}
