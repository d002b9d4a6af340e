"""A ContextUnet from a file of its parameters alone, such as the course's published checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .context_unet import ContextUnet

# A parameter of the network, and the arguments that its shape tells.
SHAPES = {
    "init_conv.conv1.0.weight": ("n_feat", "in_channels"),
    "contextembed1.model.0.weight": (None, "n_cfeat"),
    "up0.0.weight": (None, None, "bottom"),
}


def load_context_unet(path: str | Path, **options) -> ContextUnet:
    """The network whose state dict a file holds; its sizes are read off the parameters' shapes.

    Args:
        path: a .safetensors file, or one of torch.save (.pth, .pt), of which only tensors are
            unpickled.
        options: of ContextUnet, where the file comes from code with quirks of its own. For the
            course's checkpoints: pool_window=4, shortcut="random" or "zero". Perturb its training
            data with noising="course". The norm is told by the file too.

    Returns: ContextUnet on the CPU, in evaluation mode. Raises: FileNotFoundError; ValueError for a
    file that does not hold a ContextUnet's state dict; pickle.UnpicklingError for one that holds
    more than tensors.
    """
    path = Path(path)
    return context_unet_of(read_state_dict(path), path.name, **options)


def read_state_dict(path: Path):
    """What a file holds, unpickling nothing but tensors."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def sizes_of(state, name: str) -> dict[str, int]:
    """in_channels, n_feat, n_cfeat and bottom, the side of the smallest map, off the shapes.

    Args: state: a state dict; name: of its file. Raises: ValueError for another one's, or none.
    """
    if not isinstance(state, dict):
        raise ValueError(f"path: wanted a state dict in {name}, got {type(state).__name__}")
    sizes = {}
    for key, meanings in SHAPES.items():
        if not isinstance(state.get(key), Tensor):
            raise ValueError(f"path: wanted a ContextUnet's state dict, {name} has no {key}")
        sizes |= zip(meanings, state[key].shape, strict=False)
    return sizes


def context_unet_of(state, name: str, **options) -> ContextUnet:
    """`load_context_unet` of a state dict that is read already; name: of its file."""
    sizes = sizes_of(state, name)
    arguments = {size: sizes[size] for size in ("in_channels", "n_feat", "n_cfeat")}
    norm = "batch" if "init_conv.conv1.1.running_mean" in state else "group"
    arguments |= {"height": 4 * sizes["bottom"], "norm": norm}
    model = ContextUnet(**arguments | options)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"path: {name} is not a ContextUnet's state dict: {error}") from error
    return model.eval()
