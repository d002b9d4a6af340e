"""Sampling from threads, from processes, in forked workers, and after an exception."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import diffusion_ext as dx
from diffusion_ext.samplers import SAMPLERS

SCHEDULE = dx.NoiseSchedule.linear(50)
SHAPE = (3, 3, 8, 8)


class Delicate(nn.Module):
    """Another network in training mode than in evaluation: BatchNorm and dropout; and slow enough
    for threads to meet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Dropout(0.5),
            nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x, t, c):
        return self.layers(x) + t[:, None, None, None]


def networks():
    torch.manual_seed(0)
    unet = dx.nn.ContextUnet(3, 16, 4, 8)
    fused = Delicate()
    dx.fuse(fused)
    return {"delicate": Delicate(), "context unet": unet, "fused": fused}


def draw(model, seed):
    """With another sampler for each seed."""
    make = list(SAMPLERS.values())[seed % len(SAMPLERS)]
    return dx.sample(model, SHAPE, make(SCHEDULE, 8), seeds=seed, progress=False).images


@pytest.mark.parametrize("name", ["delicate", "context unet", "fused"])
@pytest.mark.parametrize("training", [True, False])
def test_eight_threads_draw_what_one_does(name, training):
    model = networks()[name].train(training)
    expected = [draw(model, seed) for seed in range(24)]
    start = threading.Barrier(8)

    def work(first):
        start.wait()
        return [draw(model, seed) for seed in range(first, 24, 8)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for first, images in enumerate(found):
        for i, image in enumerate(images):
            assert torch.equal(image, expected[first + 8 * i])
    assert all(module.training == training for module in model.modules())


def test_a_part_of_a_network_that_is_sampled_stays_in_evaluation():
    """Two networks share a part; the longer run goes on after the shorter one has ended."""
    inner = Delicate().train()
    outer, modes = nn.Sequential(inner), []

    def watch(x, t, c):
        if not modes:
            dx.sample(outer[0], SHAPE, dx.ddim(SCHEDULE, 3), progress=False)
        modes.append(inner.training)
        return inner(x, t, c)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = inner

        def forward(self, x, t, c):
            return watch(x, t, c)

    dx.sample(Wrapper(), SHAPE, dx.ddim(SCHEDULE, 3), progress=False)
    assert modes == [False, False, False]
    assert inner.training


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["callback", "model", "noise"])
@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_after_an_exception_all_is_as_before(where, kind):
    model = Delicate().train()
    table = dx.ddim(SCHEDULE, 5, eta=1.0)
    expected = dx.sample(model, SHAPE, table, seeds=3, progress=False).images

    def fail(*_):
        raise kind

    failing = {
        "callback": {"callback": fail},
        "model": {},
        "noise": {"noise": fail},
    }[where]
    hook = model.layers.register_forward_hook(fail) if where == "model" else None
    with pytest.raises(kind):
        dx.sample(model, SHAPE, table, seeds=3, progress=False, **failing)
    if hook is not None:
        hook.remove()
    assert all(module.training for module in model.modules())
    again = dx.sample(model, SHAPE, table, seeds=3, progress=False).images
    assert torch.equal(again, expected)


FORKED = """
import torch
from torch.utils.data import DataLoader, Dataset
import diffusion_ext as dx

schedule = dx.NoiseSchedule.linear(50)
norm = dx.nn.GroupNormAct(4, 16, act="silu")
big = torch.randn(64, 16, 64, 64)
assert torch.get_num_threads() == 2


def noised(i):
    x = torch.full((4, 16, 32, 32), float(i))
    t = torch.full((4,), 7)
    x_t, noise = dx.perturb(x, t, schedule, seeds=torch.arange(4) + i)
    with torch.no_grad():
        return norm(x_t), noise


class Noised(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        return noised(i)


norm(big).sum().backward()  # the parent's threads have been at work
dx.perturb(big, torch.full((64,), 3), schedule)
expected = [noised(i) for i in range(24)]
for epoch in range(2):
    loader = DataLoader(Noised(), batch_size=None, num_workers=3, multiprocessing_context="fork")
    for found, wanted in zip(loader, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
print("as expected")
"""

SAMPLING = """
import hashlib, torch
import diffusion_ext as dx
torch.manual_seed(0)
model = dx.nn.ContextUnet(3, 16, 4, 8)
table = dx.dpmpp_2m(dx.NoiseSchedule.linear(50), 20)
images = dx.sample(model, (16, 3, 8, 8), table, progress=False).images
print(hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
"""


def python(script):
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip


def test_forked_workers_call_our_ops():
    process = python(FORKED)
    output, errors = process.communicate(timeout=100)
    assert output == "as expected\n", errors


def test_two_processes_at_once_draw_the_same():
    outputs = [process.communicate(timeout=100) for process in [python(SAMPLING), python(SAMPLING)]]
    assert all(not errors for _, errors in outputs)
    digests = {output for output, _ in outputs}
    assert len(digests) == 1
    assert len(digests.pop()) == 65
