"""A network, an autoencoder and a scheduler of diffusers, as parts that `bench` times."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...fusing import fuse
from ...sampling.exports import OfTensors, exported
from .diffusers_folder import Component, components, libraries
from .subject import RANDOM_WEIGHTS, RUNTIMES, Part, Request, Subject, drawn

PROMPT = 77  # tokens of a text


def diffusers_model(request: Request) -> Subject:
    """The parts that there are of network, sampler and decoder. Where the network reads a text,
    guidance calls it on a doubled batch."""
    found = components(request.model)
    networks = {k: c.build(request) for k, c in found.items() if k != "scheduler"}
    unet, vae = networks.get("unet"), networks.get("vae")
    side, factor = _sides(unet, vae, request)
    channels = unet.config.in_channels if unet else vae.config.latent_channels if vae else 4
    latents = (request.batch, channels, side, side)
    parts, steps = [], request.steps
    if "scheduler" in found:
        run, steps = _sampler(found["scheduler"], latents, request)
        parts.append(Part("sampler", steps, run, per_call=steps))
    if unet:
        parts.insert(0, Part("network", steps, _network(unet, latents, request)))
    if vae:
        parts.append(Part("decoder", 1, _decoder(vae, side, request)))
    last = vae.config.out_channels if vae else unet.config.out_channels if unet else channels
    pictures = (request.batch, last, factor * side, factor * side)
    title = ", ".join(component.class_name for component in found.values())
    loaded = all(c.has_weights for k, c in found.items() if k in networks)
    return Subject(title, pictures, parts, _advice(found), [] if loaded else [RANDOM_WEIGHTS])


def _sides(unet, vae, request: Request) -> tuple[int, int]:
    """(side of what the network sees, pixels of the picture for each of it)"""
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 1
    if request.size is not None:
        if request.size % factor:
            raise ValueError(f"size: wanted a multiple of {factor}, got {request.size}")
        return request.size // factor, factor
    made_for = unet.config.sample_size if unet else vae.config.sample_size if vae else 64
    if not isinstance(made_for, int):
        raise ValueError(f"size: the network is made for {made_for}: say a side with --size")
    return made_for if unet or not vae else made_for // factor, factor


def _network(unet: nn.Module, latents: tuple[int, ...], request: Request) -> Callable:
    reads_text = type(unet).__name__ == "UNet2DConditionModel"
    batch = 2 * request.batch if reads_text else request.batch
    x, t = drawn((batch, *latents[1:]), request), torch.tensor(500, device=request.device)
    options = _text(unet, batch, request) if reads_text else {}
    if not reads_text and unet.config.num_class_embeds:
        options = {"class_labels": torch.zeros(batch, dtype=torch.long, device=request.device)}
    return _called(unet, "forward", request, x, t, return_dict=False, **options)


def _text(unet: nn.Module, batch: int, request: Request) -> dict:
    """A prompt's embeddings, and what Stable Diffusion XL wants beside them."""
    width = unet.config.cross_attention_dim
    if not isinstance(width, int):
        raise ValueError(f"model: wanted a network with one cross_attention_dim, got {width}")
    options = {"encoder_hidden_states": drawn((batch, PROMPT, width), request, seed=1)}
    if unet.config.addition_embed_type == "text_time":
        times = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - times
        options["added_cond_kwargs"] = {
            "text_embeds": drawn((batch, pooled), request, seed=2),
            "time_ids": torch.zeros(batch, 6, device=request.device, dtype=request.torch_dtype),
        }
    elif unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        raise ValueError("model: `bench` knows the inputs of Stable Diffusion 1, 2 and XL alone")
    return options


def _decoder(vae: nn.Module, side: int, request: Request) -> Callable:
    z = drawn((request.batch, vae.config.latent_channels, side, side), request)
    return _called(vae, "decode", request, z, return_dict=False)


class _First(nn.Module):
    """The first of what the model's function of that name returns."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *inputs, **options) -> Tensor:
        return getattr(self.model, self.name)(*inputs, **options)[0]


def _called(model: nn.Module, name: str, request: Request, x: Tensor, *rest, **options):
    """A call of the model's function of that name in the request's way."""
    if request.way in RUNTIMES:
        network = OfTensors(_First(model, name), x, *rest, **options)
        run = exported(request.way, network, network.tensors)
        return partial(run, *network.tensors)
    function = getattr(model, name)
    if request.way == "compile":
        function = torch.compile(function)
    elif request.way == "ours":
        fuse(model.to(memory_format=torch.channels_last))
        x = x.to(memory_format=torch.channels_last)
    return lambda: function(x, *rest, **options)[0]


def _sampler(component: Component, latents: tuple[int, ...], request: Request):
    """(a run of all its steps on what a network would have given, the number of its calls)"""
    diffusers, fused = libraries()
    theirs = getattr(diffusers, component.class_name)
    cls = getattr(fused, component.class_name, theirs) if request.way == "ours" else theirs
    scheduler = cls.from_config(component.config)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    start, output = drawn(latents, request), drawn(latents, request, seed=3)

    def run() -> Tensor:
        scheduler.set_timesteps(request.steps, device=request.device)
        generator = torch.Generator(request.device).manual_seed(0)
        options = {"generator": generator} if takes_generator else {}
        x = start * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        return x

    scheduler.set_timesteps(request.steps)
    return run, len(scheduler.timesteps)


def _advice(found: dict[str, Component]) -> list[str]:
    """Python that gives a pipeline what was timed."""
    _, fused = libraries()
    lines = ["import diffusion_ext as dx"]
    lines += [
        f"dx.fuse(pipe.{name}.to(memory_format=torch.channels_last))"
        for name in found
        if name != "scheduler"
    ]
    if "scheduler" in found and (name := found["scheduler"].class_name) in fused.__all__:
        lines += [
            f"from diffusion_ext.integrations.diffusers import {name}",
            f"pipe.scheduler = {name}.from_config(pipe.scheduler.config)",
        ]
    return lines
