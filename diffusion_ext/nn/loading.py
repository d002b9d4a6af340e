"""A ContextUnet from a file of its parameters alone, such as the course's published checkpoints."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .context_unet import ContextUnet
from .state_sizes import arguments_of

# What a file of ours tells beside the tensors, as JSON: in the metadata of safetensors', and of the
# whole network in a state dict of torch's.
ABOUT_KEY = "diffusion_ext.network"
MAPPING_HOLDS = os.name == "nt"  # whether a file that is mapped cannot be replaced


class Weights(NamedTuple):
    """A state dict, and what its file tells of the network beside it: {} of another's file."""

    state: Any
    about: dict[str, Any]


def load_context_unet(path: str | Path, **options: Any) -> ContextUnet:
    """The network whose state dict a file holds; its sizes are read off the parameters' shapes.

    Args:
        path: a .safetensors file, or one of torch.save (.pth, .pt), of which only tensors are
            unpickled.
        options: of ContextUnet, where the file comes from code with quirks of its own. For the
            course's checkpoints: pool_window=4, shortcut="random" or "zero". Perturb its training
            data with noising="course". The norm is told by the file too, and of exported weights
            all options are.

    Returns: ContextUnet on the CPU, in evaluation mode. Raises: FileNotFoundError; ValueError for a
    file that does not hold a ContextUnet's state dict; pickle.UnpicklingError for one that holds
    more than tensors.
    """
    path = Path(path)
    return context_unet_of(read_state_dict(path), path.name, **options)


def read_state_dict(path: Path) -> Weights:
    """What a file holds, unpickling nothing but tensors.

    Raises: ValueError for a compressed file, which torch.save does not write: what it would grow
    to is not known; pickle.UnpicklingError for one that holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {path}")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            about = _about((file.metadata() or {}).get(ABOUT_KEY), path)
            return Weights(tensors_in(file), about)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError(f"path: {path.name} is compressed; torch.save writes no such file")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return Weights(state, _about(_of_root(state).get(ABOUT_KEY), path))


def tensors_in(file: safe_open) -> dict[str, Tensor]:
    """What an open safetensors file holds, by name: mapped, so that what nobody reads takes no
    memory. On Windows copies, for a run could not replace a checkpoint that is mapped somewhere."""
    found = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return {name: tensor.clone() if MAPPING_HOLDS else tensor for name, tensor in found}


def _of_root(state: Any) -> dict[str, Any]:
    """What torch keeps of the whole network beside the tensors; {} of what is no state dict."""
    metadata = getattr(state, "_metadata", None)
    root = metadata.get("") if isinstance(metadata, dict) else None
    return root if isinstance(root, dict) else {}


def _about(text: Any, path: Path) -> dict[str, Any]:
    try:
        about = {} if text is None else json.loads(text)
        if not isinstance(about, dict) or not isinstance(about.get("model", {}), dict):
            raise TypeError(f"it is {about}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: {path.name} has no description of a network: {error}") from error
    return about


def told_by(state: Any, name: str) -> dict[str, int | str]:
    """The sizes and the norm that a state dict tells.

    Args: name: of its file. Raises: ValueError for another network's, or none.
    """
    if not isinstance(state, dict):
        raise ValueError(f"path: wanted a state dict in {name}, got {type(state).__name__}")
    try:
        return arguments_of(state)
    except KeyError as error:
        key = error.args[0]
        raise ValueError(f"path: wanted a ContextUnet's state dict, {name} has no {key}") from error


def context_unet_of(weights: Weights, name: str, **options: Any) -> ContextUnet:
    """`load_context_unet` of a file that is read already; name: of it."""
    told = told_by(weights.state, name) | weights.about.get("model", {})
    return filled_context_unet(weights.state, name, told | options)


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
    model.load_state_dict(dict(state), strict=True)  # without what torch keeps beside the tensors
    return model.eval()


def _shapes_of(state: dict[str, Tensor]) -> dict:
    """Of its tensors; None of one that is larger than the memory it was read into."""
    return {
        key: value.shape
        if isinstance(value, Tensor) and value.nbytes <= value.untyped_storage().nbytes()
        else (None,)
        for key, value in state.items()
    }
