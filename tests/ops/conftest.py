"""The backends that a test of the ops runs over, one at a time.

    cpu        the native kernels on CPU tensors
    cuda       the native kernels on CUDA tensors: on a GPU, or on the stand-in for one
               (tests/stand_in), where the same kernels run on the emulated GPU
    reference  torch, which checks the tests themselves

Marks: `backends(*names)` for a test that needs some of them only; `every_device` for one that the
emulated kernels pass on every one of DEVICES. A tensor made without a device is on the backend's.

DIFFUSION_EXT_TEST_BACKENDS=cuda,reference restricts the tests to these; no CUDA is an error then.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from harness import BACKENDS, DEVICES, EMULATED, NO_CUDA, WANTED, pretend

import diffusion_ext as dx
from diffusion_ext.ops import backend as choice

NOWHERE = (None, None)  # the backend of a test that has none of those that are wanted

if unknown := set(WANTED) - set(BACKENDS):
    raise pytest.UsageError(f"DIFFUSION_EXT_TEST_BACKENDS: {unknown} is not of {BACKENDS}")
if "cuda" in WANTED and NO_CUDA:
    raise pytest.UsageError(f"DIFFUSION_EXT_TEST_BACKENDS: no test can run on cuda: {NO_CUDA}")


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("backends")
    wanted = mark.args if mark else BACKENDS
    if NO_CUDA:
        wanted = [name for name in wanted if name != "cuda"]
    if WANTED:
        wanted = [name for name in wanted if name in WANTED]
    parameters = [(name, "hopper") for name in wanted]
    if metafunc.definition.get_closest_marker("every_device") and set(EMULATED) & set(wanted):
        parameters += [("cuda", device) for device in DEVICES if device != "hopper"]
    ids = [name if device == "hopper" else f"{name}-{device}" for name, device in parameters]
    metafunc.parametrize("backend", parameters or [NOWHERE], ids=ids or ["none"], indirect=True)


def pytest_collection_modifyitems(config, items):
    def runs(item):
        return not hasattr(item, "callspec") or item.callspec.params.get("backend") != NOWHERE

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture(autouse=True)
def backend(request):
    """Makes one of BACKENDS serve the ops; its name."""
    name, device = request.param
    if name in EMULATED:
        # Threads in an order of the test's own: the same in every run.
        pretend(zlib.crc32(request.node.nodeid.encode()), device)
    served = "reference" if name == "reference" else "native"
    with torch.device("cuda" if name == "cuda" else "cpu"), dx.use_backend(served):
        assert choice.serves(torch.empty(1)) == (name != "reference")
        yield name
