"""diffusers' schedulers on the fused kernel: the same names, one import away.

    from diffusion_ext.integrations.diffusers import DPMSolverMultistepScheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

They are subclasses of diffusers' own, with the same arguments, configs, errors and, for the same
torch.Generator, the same samples to the rounding of their dtype. A step is one kernel over the
sample (two with thresholding) and waits for no device.

ddpm_ddim.py has the two whose every timestep has a row of one table. The steps of all others
(traced.py) are read off diffusers' own code when they are first taken: see step_trace.py.

What a row of coefficients cannot say goes to diffusers' own step. docs/drop-in.md lists these
cases, and where results differ from diffusers'.
"""

from __future__ import annotations

try:
    import diffusers

    # A saved pipeline names this module, and diffusers loads from it what is one of these.
    from diffusers import SchedulerMixin  # noqa: F401
except ImportError as error:
    raise ImportError(
        "diffusers is missing, or has no such schedulers: pip install 'diffusion_ext[diffusers]'"
    ) from error

from .drop_in import check_release

check_release(diffusers.__version__)

from . import ddpm_ddim, traced  # noqa: E402
from .ddpm_ddim import *  # noqa: E402, F403
from .traced import *  # noqa: E402, F403

__all__ = sorted([*ddpm_ddim.__all__, *traced.__all__])
