"""The node of examples/comfyui, with stubs of what it uses of ComfyUI."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import diffusion_ext.integrations.k_diffusion as K

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "comfyui" / "diffusion_ext_samplers"


class CONST:
    """comfy.model_sampling's: what the sampling of flow matching models inherits from."""


class KSAMPLER:
    """comfy.samplers': calls its function with a denoiser, noise, sigmas and these names."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_k, noise, sigmas, callback=None):
        return self.sampler_function(
            model_k, noise, sigmas, extra_args={"seed": 1}, callback=callback, disable=True,
            **self.extra_options,
        )  # fmt: skip


def default_noise_sampler(x, seed=None):
    """comfy.k_diffusion.sampling's: noise of a seed, whatever the levels."""
    generator = torch.Generator().manual_seed(seed)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)


class BrownianTreeNoiseSampler:
    """comfy.k_diffusion.sampling's, of a seed; here, noise that tells the levels."""

    def __init__(self, x, sigma_min, sigma_max, seed=None, transform=None, cpu=False):
        assert cpu
        assert 0 < sigma_min < sigma_max
        self.shape, self.seed = x.shape, seed

    def __call__(self, sigma, sigma_next):
        generator = torch.Generator().manual_seed(self.seed + int(1000 * sigma))
        return torch.randn(self.shape, generator=generator)


class Model:
    """KSamplerX0Inpaint: a denoiser around a guider around a model that has a model_sampling."""

    def __init__(self, sampling):
        model = types.SimpleNamespace(model_sampling=sampling)
        self.inner_model = types.SimpleNamespace(inner_model=model)

    def __call__(self, x, sigma, seed):
        return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt())


@pytest.fixture
def node(monkeypatch):
    """The custom node's module, loaded as ComfyUI loads a folder of custom_nodes."""
    comfy = types.ModuleType("comfy")
    comfy.samplers, comfy.model_sampling = map(
        types.ModuleType, ("comfy.samplers", "comfy.model_sampling")
    )
    comfy.k_diffusion = types.ModuleType("comfy.k_diffusion")
    comfy.k_diffusion.sampling = types.ModuleType("comfy.k_diffusion.sampling")
    comfy.samplers.KSAMPLER, comfy.model_sampling.CONST = KSAMPLER, CONST
    comfy.k_diffusion.sampling.default_noise_sampler = default_noise_sampler
    comfy.k_diffusion.sampling.BrownianTreeNoiseSampler = BrownianTreeNoiseSampler
    modules = (comfy.samplers, comfy.model_sampling, comfy.k_diffusion, comfy.k_diffusion.sampling)
    for module in (comfy, *modules):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("diffusion_ext_samplers", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_sampler(node, name, noise="ComfyUI's"):
    (cls,) = node.NODE_CLASS_MAPPINGS.values()
    (sampler,) = getattr(cls(), cls.FUNCTION)(sampler_name=name, noise=noise)
    return sampler


X, SIGMAS = torch.randn(2, 4, 8, 8) * 10, torch.tensor([10.0, 3.0, 1.0, 0.2, 0.0])


def test_the_node_is_what_comfyui_wants(node):
    (name,) = node.NODE_CLASS_MAPPINGS
    cls = node.NODE_CLASS_MAPPINGS[name]
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == {name}
    assert cls.RETURN_TYPES == ("SAMPLER",)
    assert set(cls.INPUT_TYPES()["required"]) == {"sampler_name", "noise"}
    assert len(node.SAMPLERS) == len([n for n in K.__all__ if n.startswith("sample_")])


def test_every_sampler_samples_with_comfyuis_noise(node):
    for name, (function, noise_of) in node.SAMPLERS.items():
        previews, options = [], {}
        if noise_of is node.drawn:
            options = {"noise_sampler": default_noise_sampler(X, seed=1)}
        if noise_of is node.motion:
            options = {"noise_sampler": BrownianTreeNoiseSampler(X, 0.2, 10.0, seed=1, cpu=True)}
        images = get_sampler(node, name).sample(Model(object()), X, SIGMAS, previews.append)
        arguments = {"extra_args": {"seed": 1}, "disable": True} | options
        assert torch.equal(images, function(Model(object()), X, SIGMAS, **arguments))
        assert [p["i"] for p in previews] == [0, 1, 2, 3]
        assert all(p["denoised"].shape == X.shape for p in previews)


def test_noise_of_the_kernel(node):
    torch.manual_seed(3)
    images = get_sampler(node, "dpmpp_2m_sde", "kernel's").sample(Model(object()), X, SIGMAS)
    torch.manual_seed(3)
    again = get_sampler(node, "dpmpp_2m_sde", "kernel's").sample(Model(object()), X, SIGMAS)
    assert torch.equal(images, again)
    plain = get_sampler(node, "dpmpp_2m", "kernel's").sample(Model(object()), X, SIGMAS)
    assert torch.equal(plain, get_sampler(node, "dpmpp_2m").sample(Model(object()), X, SIGMAS))


def test_flow_matching_models_have_no_noise_put_in(node):
    for name, (_, noise_of) in node.SAMPLERS.items():
        sampler = get_sampler(node, name)
        if noise_of:
            with pytest.raises(ValueError, match=f"sampler_name: '{name}' adds noise"):
                sampler.sample(Model(CONST()), X, SIGMAS)
        else:
            assert sampler.sample(Model(CONST()), X, SIGMAS).isfinite().all()
