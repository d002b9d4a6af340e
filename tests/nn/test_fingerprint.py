"""The fingerprint of a weight, of which it reads a part: what cannot change without it."""

import pytest
import torch

from diffusion_ext.ops import backend

if "cpu" in backend.missing:
    pytest.skip("the C++ library is not there", allow_module_level=True)

from diffusion_ext._C import fingerprint

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def fingerprint_of(weight: torch.Tensor) -> int:
    size = weight.element_size()
    return fingerprint(weight.data_ptr(), len(weight), weight[0].numel(), size)


def weight_of(*shape, layout=torch.contiguous_format, dtype=torch.float32) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight.to(dtype, memory_format=layout)


def unnoticed(weight: torch.Tensor, parts) -> list:
    """Those of the parts of weight whose numbers can change their sign and nothing tells."""
    before, missed = fingerprint_of(weight), []
    for part in parts:
        weight[part].neg_()
        if fingerprint_of(weight) == before:
            missed.append(part)
        weight[part].neg_()
    assert fingerprint_of(weight) == before
    return missed


# Of 64 KiB and less; of odd sizes; of few filters, and of filters of few numbers; as of Stable
# Diffusion.
SHAPES = [
    (32, 16, 3, 3), (130, 70, 3, 3), (300, 33, 5, 5), (4, 1280, 3, 3), (5000, 3, 2, 2),
    (256, 256, 3, 3), (512, 512, 3, 3), (320, 640, 1, 1), (1280, 1280, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_filter_input_channel_or_tap_goes_unread(shape, layout, dtype):
    weight = weight_of(*shape, layout=layout, dtype=dtype)
    filters, channels, rows, columns = shape
    parts = [(k,) for k in range(filters)]
    parts += [(slice(None), c) for c in range(channels)]
    parts += [(slice(None), slice(None), r, s) for r in range(rows) for s in range(columns)]
    assert unnoticed(weight, parts) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (256, 256, 3, 3),
        (512, 512, 3, 3),
        (640, 320, 3, 3),
        (320, 320, 1, 1),
        (1280, 1280, 1, 1),
        (640, 1920, 1, 1),
        (130, 70, 3, 3),
    ],
    ids=str,
)
def test_no_block_of_32_filters_by_32_channels_goes_unread(shape, layout):
    weight, draw = weight_of(*shape, layout=layout), torch.Generator().manual_seed(1)
    begins = [torch.randint(0, size - 31, (300,), generator=draw).tolist() for size in shape[:2]]
    begins = [(k, c) for k in range(0, shape[0] - 31, 32) for c in range(0, shape[1] - 31, 32)] + [
        *zip(*begins, strict=True)
    ]
    assert unnoticed(weight, [(slice(k, k + 32), slice(c, c + 32)) for k, c in begins]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_up_to_16384_no_number_goes_unread(dtype):
    weight = weight_of(28, 64, 3, 3, dtype=dtype)
    assert unnoticed(weight.view(-1), range(weight.numel())) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(28, 64, 3, 3), (256, 256, 3, 3)], ids=str)
def test_changes_do_not_cancel_out(shape, dtype):
    """Of all signs, of numbers that trade places, of equal steps, of one number for another."""
    weight = weight_of(*shape, dtype=dtype)
    seen = {fingerprint_of(weight)}
    for change in (
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.copy_(w.flip(1)),
        lambda w: w.copy_(w.roll(1, 0)),
        lambda w: w.mul_(2),
        lambda w: w.zero_(),
        lambda w: w.fill_(1),
        lambda w: w.fill_(-1),
        lambda w: w[::2].neg_(),
        lambda w: w.view(torch.int16).bitwise_xor_(1),
    ):
        change(weight)
        seen.add(fingerprint_of(weight))
    assert len(seen) == 11


def test_the_same_on_any_number_of_threads():
    weight, threads = weight_of(640, 640, 3, 3), torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(fingerprint_of(weight))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
