"""context_unet: a ContextUnet that only infers, in one call, on the CPU in float32."""

from __future__ import annotations

from torch import Tensor

from .backend import kernel, register_fake

SHORTCUTS = (None, "input", "first")  # what is added to the second convolution


def context_unet(
    x: Tensor,
    scales: tuple[Tensor, Tensor],
    shifts: tuple[Tensor, Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    norms: list[Tensor],
    groups: int,
    eps: float,
    shortcut: str | None,
    window: int,
) -> Tensor:
    """The noise in x, as ContextUnet's `predict`, with BatchNorms folded and weights laid out.

    Args:
        x: [B, C, H, H], which `serves_conv2d`.
        scales, shifts: the context's and the time's embeddings, [B or 1, 2n] and [B or 1, n].
        filters, biases: of its 23 convolutions in the order in which they run, see `conv2d`.
        norms: weight and bias of its two GroupNorms, of `groups` groups and `eps`.
        shortcut: one of SHORTCUTS. window: side of the mean at the bottom.

    Returns: [B, C, H, H], channels_last.
    """
    rows = (scales[0], shifts[0], scales[1], shifts[1])
    layers = (filters, biases, norms)
    return kernel("context_unet")(x, *rows, *layers, groups, eps, SHORTCUTS.index(shortcut), window)


@register_fake("context_unet")
def _(x, scale1, shift1, scale2, shift2, filters, biases, norms, groups, eps, shortcut, window):
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, biases[-1].numel()).permute(0, 3, 1, 2)
