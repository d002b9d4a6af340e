"""Checkpoints of a cut network: a folder into which each process writes its part
(torch.distributed.checkpoint), read by any number of processes.

torch's part of it is imported where such a checkpoint is written or read: the import takes 0.1 s.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import TENSOR_GROUPS, Checkpoint, fields_of, tables_of, write_whole
from .held_files import patiently
from .processes import Processes

FIELDS_NAME, METADATA_NAME = "run.json", ".metadata"
METADATA_KINDS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in (
        "PosixPath", "WindowsPath",
    )),  # the latter module since Python 3.13
}  # fmt: skip
SHARDED = "sharded-{:08d}"  # by the steps of the run


def sharded_checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder, in the order of their steps."""
    return sorted(p for p in folder.glob("sharded-*") if (p / FIELDS_NAME).is_file())


def save_sharded(checkpoint: Checkpoint, folder: Path, keep: int, processes: Processes) -> Path:
    """Writes a checkpoint whose tensors are DTensors; its folder has its name once it is whole.

    Args: folder: the run's. keep: how many of the last ones stay.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    path = folder / SHARDED.format(checkpoint.steps)
    partial = path.with_name(f"partial-{path.name}")
    if processes.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    try:
        dcp.save(_tensors(checkpoint), checkpoint_id=partial)
    except CheckpointException as error:
        causes = "; ".join(f"process {i}: {cause[0]}" for i, cause in error.failures.items())
        raise OSError(None, causes) from error
    if processes.first:
        write_whole(partial / FIELDS_NAME, json.dumps(fields_of(checkpoint)).encode())
        if path.exists():
            patiently(shutil.rmtree, path)
        patiently(os.replace, partial, path)
        for old in sharded_checkpoints(folder)[:-keep]:
            patiently(shutil.rmtree, old)
    processes.wait()
    return path


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """By their names in the folder, `<group>.<name>`."""
    groups = {group: getattr(checkpoint, group) for group in TENSOR_GROUPS}
    groups["schedule"] = tables_of(checkpoint.schedule)
    return {f"{group}.{name}": t for group, held in groups.items() for name, t in held.items()}


def load_sharded(path: Path, like: Callable[[str, str], Tensor | None]) -> Checkpoint:
    """A checkpoint's part of this process.

    Args: like: (group, name) -> a tensor that is cut as the one of that name is to be, of the same
        shape; None for one that is whole everywhere.
    Raises: ValueError for a damaged folder.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        fields = json.loads((path / FIELDS_NAME).read_text(encoding="utf-8"))
        found = _metadata(path)
        tensors = {}
        for key, told in found.items():
            target = like(*key.split(".", 1))
            if target is None or target.shape != told.size:
                tensors[key] = torch.empty(told.size, dtype=told.properties.dtype)
            else:
                tensors[key] = torch.empty_like(target, requires_grad=False)
        dcp.load(tensors, checkpoint_id=path)
    # Whatever the parts of a damaged folder make torch stumble over.
    except (Exception, CheckpointException) as error:
        raise ValueError(f"checkpoint: {path} is damaged, or lacks parts: {error}") from error
    return Checkpoint.of(tensors, fields, path)


def _metadata(path: Path) -> dict:
    """What a folder says that it has, by name. Raises: ValueError where it lies."""
    with open(path / METADATA_NAME, "rb") as file:
        found = _Metadata(file).load().state_dict_metadata
    promised = sum(math.prod(told.size) * told.properties.dtype.itemsize for told in found.values())
    there = sum(part.stat().st_size for part in path.iterdir())
    if promised > there:
        raise ValueError(f"its tensors would be {promised} bytes, and it has {there}")
    return found


class _Metadata(pickle.Unpickler):
    """torch unpickles whatever is in this file; this one comes first, and knows its kinds alone."""

    def find_class(self, module: str, name: str):
        found = super().find_class(module, name) if (module, name) in METADATA_KINDS else None
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return found
