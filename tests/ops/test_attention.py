"""attention: the kernels on the CPU, the reference and torch's, against float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from harness import DTYPES, assert_close, same_bits
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.ops.attention import TIMED, attention_unchecked, serves_attention
from diffusion_ext.ops.backend import kernels

pytestmark = pytest.mark.backends("cpu", "reference")

only_kernels = pytest.mark.backends("cpu")
timed = pytest.mark.skipif(not TIMED, reason="torch's serves")

# B, H, Tq, Tk, d: each head size that networks have, one row, one key, tiles and blocks that are
# not whole, several blocks of keys, the keys of a text.
PROBLEMS = [
    (1, 1, 1, 1, 1),
    (2, 3, 50, 77, 40),
    (1, 2, 300, 513, 64),
    (1, 2, 97, 300, 72),
    (1, 1, 100, 1000, 160),
    (2, 1, 33, 31, 5),
    (1, 2, 64, 256, 8),
    (1, 1, 49, 129, 128),
    (3, 2, 7, 1, 80),
    (1, 1, 10, 40, 512),
    (1, 1, 48, 257, 9),
    (1, 1, 5, 20, 2048),
]
LAYOUTS = {
    "heads first": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "head last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
}
MASKS = {
    "none": lambda *shape: None,
    "bools": lambda *shape: torch.rand(shape) > 0.3,
    "numbers": torch.randn,
    "keys": lambda b, h, q, k: torch.randn(b, 1, 1, k),
    "bools of all": lambda b, h, q, k: torch.rand(q, k) > 0.3,
    "far below": lambda *shape: torch.where(torch.rand(shape) > 0.3, 0.0, -1e9),
    "infinite": lambda *shape: torch.where(torch.rand(shape) > 0.3, 0.0, -torch.inf),
    "the least float": lambda b, h, q, k: masked_rows(q, k, torch.finfo(torch.float32).min),
    "the largest float": lambda b, h, q, k: masked_rows(q, k, 2.6e38),
}


def masked_rows(queries, keys, value):
    """Some rows wholly of a value, the others in part, one of them beside -infinity."""
    mask = torch.where(torch.rand(queries, keys) > 0.3, 0.0, value)
    mask[3], mask[5, : keys // 2] = value, -torch.inf
    mask[5, keys // 2 :] = value
    return mask


def heads(batch, count, queries, keys, size, dtype=torch.float32, layout="heads first"):
    shapes = ((batch, count, tokens, size) for tokens in (queries, keys, keys))
    return [LAYOUTS[layout](torch.randn(shape)).to(dtype) for shape in shapes]


def exact(q, k, v, mask=None, scale=None, causal=False):
    """torch's, in float64. It refuses a mask beside causal."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    if causal and mask is not None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        causal = False
    q, k, v = q.double(), k.double(), v.double()
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal)


def ours(q, k, v, mask=None, scale=None, causal=False):
    """The kernel whatever the size; the reference under its backend."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if dx.ops.current_backend() == "reference":
        return reference.attention(q, k, v, mask, scale, causal)
    return attention_unchecked(q, k, v, mask, scale, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_heads_of_every_size(problem, dtype):
    q, k, v = heads(*problem, dtype=dtype)
    for causal in (False, True):
        assert_close(ours(q, k, v, causal=causal), exact(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_strides(mask, layout, causal):
    q, k, v = heads(2, 3, 70, 300, 24, layout=layout)
    numbers = MASKS[mask](2, 3, 70, 300)
    assert_close(ours(q, k, v, numbers, 0.3, causal), exact(q, k, v, numbers, 0.3, causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of", DTYPES)
def test_masks_of_other_dtypes(of, dtype):
    q, k, v = heads(1, 2, 70, 90, 16, dtype=of)
    mask = torch.randn(70, 90).to(dtype)
    assert_close(dx.attention(q, k, v, mask), exact(q, k, v, mask), factor=4)


@only_kernels
@pytest.mark.parametrize("size", [24, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["all", "q", "k", "v"])
def test_strides_are_torchs(of, layout, size):
    dense = heads(2, 3, 70, 90, 24, layout="tokens first")
    given = [
        LAYOUTS[layout](t) if of in ("all", name) else t
        for name, t in zip("qkv", dense, strict=True)
    ]
    given[2] = given[2][..., :size]
    y = F.scaled_dot_product_attention(*given)
    assert ours(*given).stride() == dx.attention(*given).stride() == y.stride()
    mask = torch.randn(1, 70, 90)
    y = F.scaled_dot_product_attention(*given, mask)
    assert dx.attention(*given, mask).stride() == y.stride()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-4, 30.0])
def test_scales(scale, causal):
    q, k, v = heads(1, 2, 64, 300, 16)
    if causal:
        seen = torch.ones(64, 300, dtype=torch.bool).tril()
        expected = exact(q, k, v, seen, scale)  # torch's own gives NaN of causal where scale <= 0
    else:
        expected = exact(q, k, v, scale=scale)
    assert_close(ours(q, k, v, None, scale, causal), expected, factor=1 + abs(scale))
    few = q[:, :, :3]
    assert_close(
        dx.attention(few, k, v, None, scale, causal), expected[:, :, :3], factor=1 + abs(scale)
    )


@pytest.mark.parametrize("queries", [1, 70])
def test_masks_of_few_dimensions(queries):
    q, k, v = heads(1, 2, queries, 90, 16)
    mask = torch.rand(90) > 0.3
    assert_close(dx.attention(q, k, v, mask), exact(q, k, v, mask[None]))
    assert_close(dx.attention(q, k, v, torch.tensor(0.5)), exact(q, k, v))


def test_values_of_another_size():
    q, k, _ = heads(1, 2, 70, 90, 24)
    for size in (1, 7, 40, 100):
        v = torch.randn(1, 2, 90, size)
        assert_close(ours(q, k, v), exact(q, k, v))


def test_three_dimensions():
    q, k, v = (t[:, 0] for t in heads(3, 1, 70, 90, 24))
    mask = torch.rand(3, 70, 90) > 0.3
    for m in (None, mask, mask[0]):
        y, expected = dx.attention(q, k, v, m), exact(*(t[:, None] for t in (q, k, v)))
        if m is not None:
            m = m[:, None] if m.dim() == 3 else m
            expected = exact(*(t[:, None] for t in (q, k, v)), m)
        assert_close(y, expected[:, 0])
    assert y.stride() == F.scaled_dot_product_attention(q, k, v).stride()


def test_a_query_that_no_key_counts_for_gives_zeros():
    q, k, v = heads(1, 2, 70, 300, 24)
    mask = torch.rand(70, 300) > 0.3
    mask[5], mask[60] = False, False
    y = ours(q, k, v, mask)
    assert y[:, :, [5, 60]].abs().max() == 0
    assert_close(y, exact(q, k, v, mask))


def test_no_keys_and_no_queries():
    q, k, v = heads(2, 3, 70, 90, 24)
    y = dx.attention(q, k[:, :, :0], v[:, :, :0])
    assert y.shape == q.shape
    assert y.abs().max() == 0
    for empty in (q[:0], q[:, :, :0]):
        y = dx.attention(empty, k[: len(empty)], v[: len(empty)])
        assert y.shape == empty.shape


@only_kernels
def test_scores_beyond_what_an_exponential_holds():
    """The largest score of a row is what the others are compared with."""
    q, k, v = heads(1, 1, 64, 600, 16)
    large = ours(1e17 * q, 1e20 * k, v, scale=1.0)
    assert_close(large, exact(1e17 * q, 1e20 * k, v, scale=1.0), factor=50)
    assert_close(ours(1e3 * q, k, v), exact(1e3 * q, k, v), factor=50)
    assert_close(ours(q, k, v, scale=1e-20), exact(q, k, v, scale=1e-20))


@only_kernels
def test_an_infinity_and_a_nan_stay_in_their_rows():
    q, k, v = heads(1, 1, 64, 300, 16)
    q[0, 0, 3, 2] = torch.nan
    v[0, 0, 7, 5] = torch.inf
    y, expected = ours(q, k, v), exact(q, k, v)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y.isnan().any(-1).sum() == 1


@only_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype):
    q, k, v = heads(3, 5, 130, 300, 40, dtype=dtype)
    y, threads = ours(q, k, v), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5, 8, 64):
            torch.set_num_threads(count)
            assert same_bits(ours(q, k, v), y)
            assert same_bits(ours(q[1:2], k[1:2], v[1:2]), y[1:2])
            assert same_bits(ours(q[:, 3:], k[:, 3:], v[:, 3:]), y[:, 3:])
    finally:
        torch.set_num_threads(threads)


@only_kernels
@timed
def test_the_error_is_no_larger_than_torchs():
    worse = []
    for size, keys in ((8, 1024), (40, 512), (64, 77), (128, 1024), (160, 256), (512, 256)):
        q, k, v = heads(1, 4, 128, keys, size)
        expected = exact(q, k, v)
        errors = [(y - expected).square().mean().sqrt() for y in (ours(q, k, v), torchs(q, k, v))]
        worse.append((errors[0] / errors[1]).item())
    assert sum(worse) / len(worse) <= 1.0
    assert max(worse) <= 1.05


def torchs(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@only_kernels
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Each has panels of its own widths."""
    given = [heads(1, 2, 70, 300, size) for size in (5, 8, 24, 40, 64, 72, 130)]
    torch.save(given, tmp_path / "inputs")
    script = (
        "import sys, torch; from diffusion_ext.ops.attention import *;"
        "given = torch.load(sys.argv[1]);"
        "torch.save([attention_unchecked(*x, None, 0.2, True) for x in given], sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "inputs", tmp_path / "y"],
        env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
        check=True,
    )
    for x, y in zip(given, torch.load(tmp_path / "y"), strict=True):
        assert_close(y, exact(*x, None, 0.2, True))


@only_kernels
@timed
def test_what_the_kernels_serve():
    q, k, v = heads(1, 2, 64, 77, 64)
    assert serves_attention(q, k, v, None)
    assert not serves_attention(q[:, :, :63], k, v, None)  # laying out the keys takes longer
    assert not serves_attention(*(t[..., :1] for t in (q[:, :, :15], k, v)), None)
    many = k[:, :, :1].expand(1, 2, 10**10, 64)
    assert not serves_attention(q, many, many, None)  # for want of memory
    assert not serves_attention(q, k[:, :, :7], v[:, :, :7], None)
    assert not serves_attention(q.double(), k, v, None)
    assert not serves_attention(q.requires_grad_(), k, v, None)
    with torch.no_grad():
        assert serves_attention(q, k, v, None)
    long = torch.zeros(1, 1, 3000, 3000)
    assert not serves_attention(long, long, long, None)


def test_gradients_are_torchs():
    q, k, v = (t.double().requires_grad_() for t in heads(1, 2, 5, 6, 4))
    mask = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dx.attention, (q, k, v, mask))
    q, k, v = (t.float().requires_grad_() for t in heads(1, 2, 80, 80, 4))
    y = dx.attention(q, k, v, causal=True)
    gradients = torch.autograd.grad(y.square().sum(), (q, k, v))
    expected = torch.autograd.grad(exact(q, k, v, causal=True).square().sum(), (q, k, v))
    for got, wanted in zip(gradients, expected, strict=True):
        assert_close(got, wanted, factor=4)


def test_causal_of_more_keys_than_queries_lays_out_those_that_are_seen():
    q, k, v = heads(1, 1, 64, 64, 8)
    many = (t[:, :, :1].expand(1, 1, 10**9, 8) for t in (k, v))
    if dx.ops.current_backend() != "reference":
        assert_close(ours(q, *many, causal=True), v[:, :, :1].expand(q.shape).double())


def test_forward_derivatives():
    q, k, v = heads(1, 2, 70, 90, 16)
    _, got = torch.func.jvp(lambda q: dx.attention(q, k, v), (q,), (torch.ones_like(q),))
    ahead, behind = (exact(q + step, k, v) for step in (1e-4, -1e-4))
    torch.testing.assert_close(got, ((ahead - behind) / 2e-4).float(), rtol=1e-2, atol=1e-3)


@only_kernels
def test_an_export_leaves_the_number_of_tokens_open():
    class Attends(torch.nn.Module):
        def forward(self, q):
            return dx.attention(q, q, q)

    q = torch.randn(1, 2, 70, 16)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Attends(), (q,), dynamic_shapes={"q": {2: tokens}})
    for x in (q, q[:, :, :5]):
        torch.testing.assert_close(program.module()(x), dx.attention(x, x, x))


@only_kernels
def test_fakes():
    for layout in LAYOUTS:
        q, k, v = heads(2, 3, 70, 90, 24, layout=layout)
        for values in (v, v[..., :8]):
            arguments = (q, k, values, torch.randn(70, 90).expand(2, 3, 70, 90), 0.2, False)
            torch.library.opcheck(kernels().attention.default, arguments)


@only_kernels
@pytest.mark.compiles
def test_compiled():
    q, k, v = heads(1, 2, 80, 90, 24)
    with torch.no_grad():
        y = torch.compile(dx.attention, fullgraph=True)(q, k, v)
    assert same_bits(y, dx.attention(q, k, v))
