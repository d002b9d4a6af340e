"""Schedules, grids and samplers: a sampler is a function from a schedule to a table of steps."""

from ..ops.sampler_step import COLUMNS
from .adams import deis, ipndm, lms, plms
from .distilled import lcm, tcd
from .dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde
from .first_order import ddim, ddim_inversion, ddpm, flow_euler
from .forms import EPS, X0, Form, X, Z, carried, landed, slot
from .grids import SPACINGS, spaced_timesteps
from .guidance import guided
from .karras import (
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    flow_heun,
    heun,
)
from .noising import denoising_loss, perturb
from .rows import PREDICTIONS, Row, table_of, tabulate
from .sa_solver import sa_solver
from .schedules import NoiseSchedule
from .single_steps import ddim_step, ddpm_step, sampler_step
from .step_table import StepTable
from .unipc import unipc

# Those that take (schedule, steps, ...), by name.
SAMPLERS = {
    make.__name__: make
    for make in (
        ddim, euler, euler_ancestral, heun, dpm2, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde,
        dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, plms, ipndm, deis, unipc, sa_solver, lcm, tcd,
    )
}  # fmt: skip

__all__ = [
    "COLUMNS", "EPS", "PREDICTIONS", "SAMPLERS", "SPACINGS", "X0", "Form", "NoiseSchedule",
    "Row", "StepTable", "X", "Z", "carried", "ddim", "ddim_inversion", "ddim_step", "ddpm",
    "ddpm_step", "deis", "denoising_loss", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_2m_sde",
    "dpmpp_2s_ancestral", "dpmpp_3m_sde", "dpmpp_sde", "euler", "euler_ancestral", "flow_euler",
    "flow_heun", "guided", "heun", "ipndm", "landed", "lcm", "lms", "perturb", "plms",
    "sa_solver", "sampler_step", "slot", "spaced_timesteps", "table_of", "tabulate", "tcd", "unipc",
]  # fmt: skip
