"""Fused networks on a GPU, and those that move to it and back."""

import copy
import io
import pickle

import pytest
import torch
from fused_models import vary_gently
from torch import nn

import diffusion_ext as dx
from diffusion_ext.ops import backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def network(layout):
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1)]
    return vary_gently(nn.Sequential(*layers)).to(memory_format=layout).requires_grad_(False)


def near(model, expected, device, tolerance=1e-3):
    y = model(X.to(device, next(model.parameters()).dtype))
    assert y.device.type == torch.device(device).type
    torch.testing.assert_close(y.cpu().float(), expected, rtol=tolerance, atol=tolerance)


@LAYOUTS
@pytest.mark.usefixtures("small_work_counts")
def test_filters_of_the_cpu_serve_no_gpu(layout):
    model = network(layout)
    expected = model(X)
    dx.fuse(model)
    for device in ("cpu", "cuda", "cpu", "cuda"):
        near(model.to(device), expected, device)
    for parameter in model[0].parameters():
        parameter.mul_(2)
    plain = copy.deepcopy(model)
    dx.unfuse(plain)
    near(model.cpu(), plain.cpu()(X), "cpu")


@LAYOUTS
def test_copies_and_files(layout):
    model = network(layout)
    expected = model(X)
    dx.fuse(model.cuda())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    near(torch.load(file, map_location="cpu", weights_only=False), expected, "cpu")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        near(other, expected, "cuda")
    near(copy.deepcopy(model).bfloat16(), expected, "cuda", 1e-1)
    with torch.inference_mode():
        near(model, expected, "cuda")


def test_autocast_gives_torchs_dtypes():
    model = network(torch.contiguous_format).cuda()
    fused = copy.deepcopy(model)
    dx.fuse(fused)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            ours, theirs = X.cuda(), X.cuda()
            for layer, plain in zip(fused, model, strict=True):
                ours, theirs = layer(ours), plain(theirs)
                assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(torch|diffusion_ext)")
def test_torch_jit_trace_before_any_op_of_ours_ran(monkeypatch):
    norm = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()).cuda()
    expected = norm(X.cuda())
    dx.fuse(norm)
    monkeypatch.setattr(backend, "_code", {})
    traced = torch.jit.trace(norm, (X.cuda(),))
    torch.testing.assert_close(traced(X.cuda()), expected)
