"""A ComfyUI node: diffusion_ext's samplers as a SAMPLER, for SamplerCustom and its relatives.

Put this folder into ComfyUI/custom_nodes; docs/comfyui.md has the rest.
"""

from __future__ import annotations

import comfy.model_sampling
import comfy.samplers

import diffusion_ext.integrations.k_diffusion as K

# The name in the menu -> the function, and whether it puts noise in.
SAMPLERS = {
    "euler": (K.sample_euler, False),
    "euler_ancestral": (K.sample_euler_ancestral, True),
    "heun": (K.sample_heun, False),
    "dpm_2": (K.sample_dpm_2, False),
    "dpm_2_ancestral": (K.sample_dpm_2_ancestral, True),
    "lms": (K.sample_lms, False),
    "dpmpp_2s_ancestral": (K.sample_dpmpp_2s_ancestral, True),
    "dpmpp_sde": (K.sample_dpmpp_sde, True),
    "dpmpp_2m": (K.sample_dpmpp_2m, False),
    "dpmpp_2m_sde": (K.sample_dpmpp_2m_sde, True),
    "dpmpp_3m_sde": (K.sample_dpmpp_3m_sde, True),
}
NOISES = ("ComfyUI's", "kernel's")


class DiffusionExtSampler:
    """A sampler by name; its noise is ComfyUI's (the same images) or made in the kernel."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler_name": (tuple(SAMPLERS),), "noise": (NOISES,)}}

    def get_sampler(self, sampler_name: str, noise: str):
        function, noisy = SAMPLERS[sampler_name]

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            options = {"noise_sampler": "counter"} if noisy and noise == "kernel's" else {}
            if noisy and _flow_matching(model):
                plain = ", ".join(name for name, (_, noisy) in SAMPLERS.items() if not noisy)
                raise ValueError(
                    f"sampler_name: {sampler_name!r} adds noise as diffusion models want it, not "
                    f"flow matching ones (SD3, Flux ...); wanted one of {plain}"
                )
            return function(model, x, sigmas, extra_args, callback, disable, **options)

        return (comfy.samplers.KSAMPLER(sample),)


def _flow_matching(model) -> bool:
    """Whether the model's sample is (1 - sigma)·x0 + sigma·ε."""
    sampling = model.inner_model.inner_model.model_sampling
    return isinstance(sampling, comfy.model_sampling.CONST)


NODE_CLASS_MAPPINGS = {"DiffusionExtSampler": DiffusionExtSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffusionExtSampler": "Sampler (diffusion_ext)"}
