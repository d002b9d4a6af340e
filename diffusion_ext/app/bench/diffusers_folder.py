"""What `bench` is asked for of diffusers: a folder that it saved, or a configuration built in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .subject import Request

# The configurations of well-known models; what is not said is diffusers' own default.
BUILT_IN = {
    "ddpm-cifar10": {  # google/ddpm-cifar10-32 (Ho et al. 2020)
        "unet": {
            "_class_name": "UNet2DModel", "sample_size": 32, "attention_head_dim": None,
            "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        },
        "scheduler": {"_class_name": "DDIMScheduler"},
    },
    "stable-diffusion": {  # version 1.5 (Rombach et al. 2022)
        "unet": {
            "_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768,
        },
        "vae": {
            "_class_name": "AutoencoderKL", "sample_size": 512, "layers_per_block": 2,
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
        "scheduler": {
            "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1,
        },
    },
}  # fmt: skip
CONFIGS = ("config.json", "scheduler_config.json")
WEIGHTS = [
    f"diffusion_pytorch_model.{kind}{parts}"
    for kind in ("safetensors", "bin")
    for parts in ("", ".index.json")
]
KINDS = {
    "UNet2DModel": "unet", "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae", "AutoencoderTiny": "vae", "VQModel": "vae",
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: its configuration, and the folder of its weights, if they are there."""

    config: dict
    folder: Path | None = None

    @property
    def class_name(self) -> str:
        return self.config["_class_name"]

    @property
    def kind(self) -> str | None:
        return "scheduler" if "Scheduler" in self.class_name else KINDS.get(self.class_name)

    def build(self, request: Request) -> nn.Module:
        """The network, on its device. Without weights in the folder, of random ones."""
        diffusers, _ = libraries()
        diffusers.logging.set_verbosity_error()
        torch.manual_seed(0)
        cls, dtype = getattr(diffusers, self.class_name), request.torch_dtype
        if self.has_weights:
            model = cls.from_pretrained(self.folder, torch_dtype=dtype, local_files_only=True)
        else:
            model = cls.from_config(self.config).to(dtype)
        return model.eval().to(request.device)

    @property
    def has_weights(self) -> bool:
        """Whole, or in parts; a variant of another precision alone is none."""
        return self.folder is not None and any((self.folder / name).is_file() for name in WEIGHTS)


def is_diffusers_folder(folder: Path) -> bool:
    """A run of `train` has a config.json too, which names no class."""
    return (folder / "model_index.json").is_file() or _component(folder) is not None


def components(model: str) -> dict[str, Component]:
    """Of a built-in name, or of a folder: unet, vae and scheduler, as far as it has them.

    Raises: ValueError for a folder that has none, or a network that is not known.
    """
    if model in BUILT_IN:
        return {name: Component(config) for name, config in BUILT_IN[model].items()}
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        folders = [folder / name for name in index if (folder / name).is_dir()]
    else:
        folders = [folder]
    read = [_component(folder) for folder in folders]
    found = {c.kind: c for c in read if c is not None and c.kind is not None}
    if not found or ("unet" not in found and len(folders) > 1):
        names = ", ".join(c.class_name for c in read if c is not None)
        raise ValueError(
            f"model: wanted a {' or '.join(KINDS)} or a scheduler, got a folder of {names}"
        )
    return found


def _component(folder: Path) -> Component | None:
    for name in CONFIGS:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            return Component(config, folder) if "_class_name" in config else None
    return None


def libraries():
    """(diffusers, our schedulers for it). Raises: ImportError that says what to install."""
    from ...integrations import diffusers as fused  # isort: skip
    import diffusers

    return diffusers, fused
