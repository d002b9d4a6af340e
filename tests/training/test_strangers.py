"""Files from strangers: what they promise is checked before memory is taken or code is run."""

import io
import json
import pickle
import resource
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from malice import Evil
from safetensors.torch import save_file
from small_runs import tiny_trainer

from diffusion_ext.nn import ContextUnet, load_context_unet
from diffusion_ext.training import (
    load_checkpoint,
    load_data,
    load_trained,
    save_checkpoint,
)
from diffusion_ext.training.checkpoints import METADATA_KEY
from diffusion_ext.training.data.array_files import memory_available

MIB = 2**20


def peak_growth(function):
    """MiB by which the process's largest memory grows in a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def header(shape, dtype="|u1"):
    content = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, described)
    return content.getvalue()


def refused(load, path, match):
    def attempt():
        with pytest.raises(ValueError, match=match) as raised:
            load(path)
        assert str(path) in str(raised.value) or path.name in str(raised.value)

    assert peak_growth(attempt) < 200


@pytest.mark.parametrize("count", [10**6, 10**15])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_that_is_shorter_than_its_header(tmp_path, count, suffix):
    path, content = tmp_path / f"a.{suffix}", header((count, 64, 64, 3)) + bytes(100)
    if suffix == "npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
    else:
        path.write_bytes(content)
    refused(load_data, path, r"its header promises uint8 \[1.*, of which it has 100")


def test_an_npz_bomb(tmp_path):
    """Two files of some MB that would be more than the memory there is."""
    path, block = tmp_path / "bomb.npz", bytes(MIB)
    blocks = 64
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header((blocks * MIB // 64, 8, 8)))
        for _ in range(blocks):
            file.write(block)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="utf-8") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 100 * MIB, limits[1]))
    try:
        refused(load_data, path, r"bomb\.npz wants 0\.312 GiB of memory, of which 0\.09")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert memory_available() > 100 * MIB


def png(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("size", [(60000, 60000), (10000, 10000), (1, 2**30)], ids=str)
@pytest.mark.parametrize("lazy", [False, True])
def test_images_of_absurd_sizes(tmp_path, size, lazy):
    (tmp_path / "a.png").write_bytes(png(*size))

    def load(_):
        data = load_data(tmp_path, size=8, lazy=lazy)
        list(data.batches([np.array([0])], torch.device("cpu")))

    refused(load, tmp_path / "a.png", "exceeds limit of")


def safetensors(entry, data=b""):
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text + data


LIES = {
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "tensor longer than the file": safetensors(
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}
    ),
    "shape larger than its data": safetensors(
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}, bytes(16)
    ),
    "shape that overflows": safetensors(
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}, bytes(16)
    ),
    "offsets backwards": safetensors({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}),
}


@pytest.mark.parametrize("load", [load_checkpoint, load_trained])
@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(tmp_path, load, lie):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[lie])
    refused(load, path, "checkpoint: ")


@pytest.mark.parametrize("suffix", ["pth", "pt", "npy", "npz", "safetensors"])
@pytest.mark.parametrize("load", [load_trained, load_data])
def test_a_malicious_pickle_is_not_run(tmp_path, suffix, load):
    path, mark = tmp_path / f"a.{suffix}", tmp_path / "was-run"
    path.write_bytes(pickle.dumps(Evil(mark), protocol=2))
    with pytest.raises(ValueError, match=r"checkpoint: |data: "):
        load(path)
    pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have


def test_a_malicious_state_dict_is_refused(tmp_path):
    path, mark = tmp_path / "a.pth", tmp_path / "was-run"
    torch.save({**ContextUnet(1, 8, 2, 4).state_dict(), "more": Evil(mark)}, path)
    with pytest.raises(ValueError, match="it is no file of tensors alone"):
        load_trained(path)
    assert not mark.exists()
    with pytest.raises(pickle.UnpicklingError):
        load_context_unet(path)
    np.save(tmp_path / "a.npy", np.array([Evil(mark)]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot read the array"):
        load_data(tmp_path / "a.npy")
    assert not mark.exists()


def test_a_state_dict_of_one_number_that_says_it_is_many(tmp_path):
    """Stride 0: a file of some bytes whose network would take hundreds of GB."""
    path = tmp_path / "a.pth"
    with torch.device("meta"):
        huge = {n: v.shape for n, v in ContextUnet(3, 8 * 2**13, 5, 16).state_dict().items()}
    torch.save({name: torch.zeros(1)[0].expand(shape) for name, shape in huge.items()}, path)
    assert path.stat().st_size < MIB
    refused(load_trained, path, "is not a ContextUnet's state dict: wanted ")


def test_a_compressed_state_dict(tmp_path):
    path, plain = tmp_path / "a.pth", tmp_path / "plain.pth"
    torch.save(ContextUnet(1, 8, 2, 4).state_dict(), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    refused(load_trained, path, "is compressed; torch.save writes no such file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_configuration": {"in_channels": 1, "n_feat": 2**16, "n_cfeat": 2, "height": 4}},
         "not a ContextUnet's state dict: wanted"),
        ({"model_configuration": {"width": 3}}, "describes no ContextUnet"),
        ({"model_configuration": {"in_channels": 1, "n_feat": "8"}}, "describes no ContextUnet"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_about_its_network(tmp_path, change, message):
    good = tiny_trainer(tmp_path).checkpoint()
    save_checkpoint(type(good)(**{**vars(good), **change}), tmp_path / "a.safetensors")

    def load():
        with pytest.raises(ValueError, match=message):
            load_trained(tmp_path / "a.safetensors")

    assert peak_growth(load) < 200


@pytest.mark.parametrize(
    "fields",
    ["[]", "{}", "not json", '{"class_names": 3}', '{"class_names": [], "unknown": 1}'],
)
def test_metadata_of_another_kind(tmp_path, fields):
    path = tmp_path / "a.safetensors"
    save_file({"model.a": torch.zeros(2)}, path, {METADATA_KEY: fields})
    refused(load_checkpoint, path, "has not what a checkpoint has")


@pytest.mark.parametrize("field", ["losses", "steps", "training", "class_names"])
def test_fields_of_another_kind(tmp_path, field):
    good = tiny_trainer(tmp_path).checkpoint()
    path = tmp_path / "a.safetensors"
    save_checkpoint(type(good)(**{**vars(good), field: 0.5}), path)
    refused(load_checkpoint, path, f"has not what a checkpoint has: {field} is 0.5")
