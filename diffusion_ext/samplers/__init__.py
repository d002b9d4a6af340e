"""Schedules, grids and samplers: a sampler is a function from a schedule to a table of steps."""

from ..ops.sampler_step import COLUMNS
from .dpm_solver import dpmpp_2m
from .first_order import ddim, ddim_inversion, ddpm, euler, euler_ancestral, flow_euler
from .grids import SPACINGS, spaced_timesteps
from .guidance import guided
from .noising import perturb
from .rows import PREDICTIONS
from .schedules import NoiseSchedule
from .single_steps import ddim_step, ddpm_step
from .step_table import StepTable

__all__ = [
    "COLUMNS", "PREDICTIONS", "SPACINGS", "NoiseSchedule", "StepTable", "ddim", "ddim_inversion",
    "ddim_step", "ddpm", "ddpm_step", "dpmpp_2m", "euler", "euler_ancestral", "flow_euler",
    "guided", "perturb", "spaced_timesteps",
]  # fmt: skip
