"""A ComfyUI node: diffusion_ext's samplers as a SAMPLER, for SamplerCustom and its relatives.

Put this folder into ComfyUI/custom_nodes; docs/comfyui.md has the rest.
"""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers

import diffusion_ext.integrations.k_diffusion as K


def drawn(x, sigmas, seed):
    """ComfyUI's noise of the ancestral samplers: anew for each step."""
    return comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)


def motion(x, sigmas, seed):
    """ComfyUI's noise of the SDE samplers: the changes of a Brownian motion over sigma."""
    low, high = sigmas[sigmas > 0].min(), sigmas.max()
    return comfy.k_diffusion.sampling.BrownianTreeNoiseSampler(x, low, high, seed=seed, cpu=True)


# The name in the menu -> the function, and ComfyUI's noise for it, if it puts noise in.
SAMPLERS = {
    "euler": (K.sample_euler, None),
    "euler_ancestral": (K.sample_euler_ancestral, drawn),
    "heun": (K.sample_heun, None),
    "dpm_2": (K.sample_dpm_2, None),
    "dpm_2_ancestral": (K.sample_dpm_2_ancestral, drawn),
    "lms": (K.sample_lms, None),
    "dpmpp_2s_ancestral": (K.sample_dpmpp_2s_ancestral, drawn),
    "dpmpp_sde": (K.sample_dpmpp_sde, motion),
    "dpmpp_2m": (K.sample_dpmpp_2m, None),
    "dpmpp_2m_sde": (K.sample_dpmpp_2m_sde, motion),
    "dpmpp_3m_sde": (K.sample_dpmpp_3m_sde, motion),
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
        function, noise_of = SAMPLERS[sampler_name]

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            arguments = (model, x, sigmas, extra_args, callback, disable)
            if noise_of is None:
                return function(*arguments)
            if _flow_matching(model):
                plain = ", ".join(name for name, (_, noise_of) in SAMPLERS.items() if not noise_of)
                raise ValueError(
                    f"sampler_name: {sampler_name!r} adds noise as diffusion models want it, not "
                    f"flow matching ones (SD3, Flux ...); wanted one of {plain}"
                )
            if noise == "kernel's":
                return function(*arguments, noise_sampler="counter")
            seed = (extra_args or {}).get("seed")
            return function(*arguments, noise_sampler=noise_of(x, sigmas, seed))

        return (comfy.samplers.KSAMPLER(sample),)


def _flow_matching(model) -> bool:
    """Whether the model's sample is (1 - sigma)·x0 + sigma·ε."""
    sampling = model.inner_model.inner_model.model_sampling
    return isinstance(sampling, comfy.model_sampling.CONST)


NODE_CLASS_MAPPINGS = {"DiffusionExtSampler": DiffusionExtSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffusionExtSampler": "Sampler (diffusion_ext)"}
