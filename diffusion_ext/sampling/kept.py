"""What is made of a model and kept: the last ones used, and whether they still have its weights."""

from __future__ import annotations

import zlib

import torch
from torch import nn


def keep_last(kept: dict, key, value, most: int) -> None:
    """kept[key] = value, as the last one used; of the others the first go."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > most:
        kept.pop(next(iter(kept)), None)


def digest_of_weights(model: nn.Module) -> int:
    """Of every number of its parameters and buffers, however they were written."""
    digest = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), digest)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = zlib.crc32(raw.numpy(), digest)
    return digest
