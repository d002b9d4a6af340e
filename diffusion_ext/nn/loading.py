"""A ContextUnet from a file of its parameters alone, such as the course's published checkpoints."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

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


def load_context_unet(path: str | Path, **options: Any) -> ContextUnet:
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
    """What a file holds, unpickling nothing but tensors.

    Raises: ValueError for a compressed file, which torch.save does not write: what it would grow
    to is not known; pickle.UnpicklingError for one that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError(f"path: {path.name} is compressed; torch.save writes no such file")
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
    return filled_context_unet(state, name, arguments | options)


def filled_context_unet(state: dict[str, Tensor], name: str, arguments: dict) -> ContextUnet:
    """ContextUnet(**arguments) with a state dict's values, in evaluation mode.

    The sizes come from a file that may lie, so no memory is taken before its tensors are seen to
    have them, and to lie in the file.

    Args: name: of the file.
    Raises: ValueError for arguments that ContextUnet does not take, or another network's state.
    """
    try:
        with torch.device("meta"):
            shapes = {
                key: value.shape for key, value in ContextUnet(**arguments).state_dict().items()
            }
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"path: {name} describes no ContextUnet: {error}") from error
    for key in sorted(shapes.keys() | state.keys()):
        wanted, found = (list(s[key]) if key in s else None for s in (shapes, _shapes_of(state)))
        if wanted != found:
            raise ValueError(
                f"path: {name} is not a ContextUnet's state dict: wanted {key} of shape {wanted}, "
                f"got {found}"
            )
    model = ContextUnet(**arguments)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _shapes_of(state: dict[str, Tensor]) -> dict:
    """Of its tensors; None of one that is larger than the memory it was read into."""
    return {
        key: value.shape
        if isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()
        else (None,)
        for key, value in state.items()
    }
