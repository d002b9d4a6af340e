"""What a ContextUnet's state dict tells of its network: sizes and norm, off names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# A parameter of the network, and the arguments that its shape tells.
SHAPES = {
    "init_conv.conv1.0.weight": ("n_feat", "in_channels"),
    "contextembed1.model.0.weight": (None, "n_cfeat"),
    "up0.0.weight": (None, None, "bottom"),
}
OF_BATCH_NORM = "init_conv.conv1.1.running_mean"  # a group norm has none
SIZES = ("in_channels", "n_feat", "n_cfeat", "height")


def arguments_of(state: Mapping[str, Any]) -> dict[str, int | str]:
    """in_channels, n_feat, n_cfeat, height and norm: the arguments of ContextUnet.

    Raises: KeyError naming the parameter that another network's state dict has not.
    """
    sizes: dict[str | None, int] = {}
    for key, meanings in SHAPES.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.dim() < len(meanings):
            raise KeyError(key)
        sizes |= zip(meanings, value.shape, strict=False)
    sizes["height"] = 4 * sizes["bottom"]  # the network halves its images twice
    norm = "batch" if OF_BATCH_NORM in state else "group"
    return {**{name: sizes[name] for name in SIZES}, "norm": norm}


def call_of(arguments: Mapping[str, Any]) -> str:
    """The Python that builds a network: ContextUnet(3, 32, 3, 16, norm='group')."""
    sizes = [str(arguments[name]) for name in SIZES]
    options = [f"{name}={value!r}" for name, value in arguments.items() if name not in SIZES]
    return f"ContextUnet({', '.join(sizes + options)})"


def check_fits(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """The weights are of a ContextUnet of the sizes and the norm that this one has.

    What else a state dict may lack is left to torch, which names it.

    Args: state: of the weights. own: of the network that is to take them.
    Raises: ValueError naming the network that the weights are of.
    """
    if state and not state.keys() & own.keys():
        wanted, got = next(iter(own)), next(iter(state))
        raise ValueError(
            f"state_dict: wanted names such as {wanted}, got others, such as {got}; "
            "dx.load(path).model is the network of a run, a checkpoint or exported weights"
        )
    try:
        theirs, ours = arguments_of(state), arguments_of(own)
    except KeyError:
        return
    other = [f"{name}={value!r}" for name, value in ours.items() if value != theirs[name]]
    if other:
        raise ValueError(
            f"state_dict: the weights are of {call_of(theirs)}; this network has "
            f"{', '.join(other)}; dx.nn.load_context_unet(path) builds the one that fits"
        )
