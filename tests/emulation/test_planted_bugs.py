"""The emulated GPU finds the bugs that kernels have: each kernel of planted_bugs.cu is right
without its bugs, whatever the order its threads run in, and found out with each of them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from library import load, path_of

SEEDS = range(10)
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
NAN = float("nan")


@pytest.fixture(scope="module")
def ops():
    load("planted_bugs")
    return torch.ops.diffusion_ext_planted_bugs


@pytest.fixture(autouse=True)
def an_h100(ops):
    configure(ops, 0)
    yield
    configure(ops, 0)


def configure(ops, seed, multiprocessors=132, shared_bytes=227 * 1024 - 4096, max_cluster=8):
    ops.configure(seed, multiprocessors, shared_bytes, max_cluster)


def x_of(size):
    return torch.arange(1.0, size + 1)


# What each kernel's x is, and what it makes of it.
KERNELS = {
    "block_sum": (x_of(768), lambda x: x.view(6, 128).sum(1)),
    "warp_sum": (x_of(128), lambda x: x.view(4, 32).sum(1)),
    "twice": (x_of(1003), lambda x: 2 * x),
    "reverse": (x_of(768), lambda x: x.view(6, 128).flip(1).flatten()),
    "by_shared": (x_of(768), lambda x: x),
    "cluster_sum": (x_of(8), lambda x: x.view(2, 4).sum(1).repeat_interleave(4)),
    "in_halves": (x_of(8), lambda x: x.view(2, 4).sum(1).repeat_interleave(4)),
    "follower": (x_of(128), lambda x: 2 * x),
    "root": (x_of(128), lambda x: x.double().sqrt().float()),
}


def run(ops, kernel, bug, seed):
    """Whether the kernel's result is right, every element of it and none beside it."""
    x, expected = KERNELS[kernel][0], KERNELS[kernel][1](KERNELS[kernel][0])
    padded_x = torch.cat([x, x.new_tensor([7.0] * 4)])
    padded = torch.full([expected.numel() + 8], NAN)
    configure(ops, seed)
    getattr(ops, kernel)(padded[4:-4], padded_x[: x.numel()], bug)
    untouched = padded[:4].isnan().all() and padded[-4:].isnan().all()
    return bool(untouched) and torch.equal(padded[4:-4], expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_for_every_seed(ops, kernel):
    assert all(run(ops, kernel, 0, seed) for seed in SEEDS)


@pytest.mark.parametrize(
    ("kernel", "bug"),
    [
        ("block_sum", 1),  # no barrier after the loads
        ("block_sum", 2),  # none within the sum
        ("warp_sum", 1),  # a wrong lane
        ("twice", 1),  # an element too many
        ("twice", 2),  # an element left unwritten
        ("cluster_sum", 1),  # no cluster barrier before the read
    ],
)
def test_wrong_results(ops, kernel, bug):
    assert not all(run(ops, kernel, bug, seed) for seed in SEEDS)


# LINE: a line of planted_bugs.cu; #: a number
WAITS_ELSEWHERE = "but others wait at that of LINE"
ERRORS = {
    ("warp_sum", 2): "warp_sum, block (0, 0), thread #: waits at shuffle_xor of LINE, "
    "but block (0, 0), thread 39 has ended",
    ("warp_sum", 3): "warp_sum, block (0, 0), thread #: shuffle_xor of LINE: no lane has 32",
    ("warp_sum", 4): "warp_sum, block (0, 0), thread #: waits at shuffle_xor of LINE, "
    + WAITS_ELSEWHERE,
    ("twice", 3): "twice, block (#, 0), thread #: an access of 16 bytes is not aligned",
    ("reverse", 1): "reverse, block (4, 0), thread #: waits at block_barrier of LINE, "
    "but block (4, 0), thread 77 has ended",
    ("reverse", 2): "reverse, block (#, 0), thread #: waits at block_barrier of LINE, "
    + WAITS_ELSEWHERE,
    ("reverse", 3): "reverse, block (#, 0), thread #: waits at block_barrier of LINE, "
    "but block (#, 0), thread # waits at shuffle_xor of LINE",
    ("cluster_sum", 3): "cluster_sum, block (#, 0), thread 0: of_rank of LINE: no rank 4",
    ("cluster_sum", 4): "cluster_sum, block (#, 0), thread 0: of_rank of LINE: not a pointer into "
    "the block's shared memory",
    ("cluster_sum", 5): "cluster_sum, block (#, 0), thread #: waits at cluster_barrier of LINE, "
    "but block (#, 0), thread 3 has ended",
    ("in_halves", 1): "in_halves, block (#, 0), thread 5: cluster_arrive of LINE: it has arrived "
    "already",
    ("in_halves", 2): "in_halves, block (#, 0), thread 5: cluster_wait without cluster_arrive",
    ("in_halves", 3): "in_halves, block (#, 0), thread 5: ends between cluster_arrive and "
    "cluster_wait",
    ("in_halves", 4): "in_halves, block (#, 0), thread 5: of_rank of LINE: after cluster_arrive "
    "nothing keeps the block that it reads",
    ("follower", 1): "follower, block (0, 0), thread 9: ends without await_last_launch",
    ("cluster_sum", 6): "cluster_sum, block (#, 0), thread 0: of_rank of LINE: "
    "block (#, 0) has ended",
}
MAY_HAVE_ENDED = (
    "cluster_sum, block (#, 0), thread 0: no cluster_barrier follows of_rank of LINE: the block "
    "that it reads may have ended",
    "cluster_sum, block (#, 0), thread 0: of_rank of LINE: block (#, 0) has ended",
)


def pattern(message):
    return re.escape(message).replace("LINE", r"\S*planted_bugs\.cu:\d+").replace(r"\#", r"\d+")


@pytest.mark.parametrize(("kernel", "bug"), ERRORS)
def test_errors(ops, kernel, bug):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=pattern(ERRORS[kernel, bug])):
            run(ops, kernel, bug, seed)
        assert run(ops, kernel, 0, seed)  # nothing is left of the error


def test_a_block_that_may_end_before_it_is_read(ops):
    """An error for every seed, not only where the block has ended."""
    found = set()
    for seed in SEEDS:
        with pytest.raises(RuntimeError) as error:
            run(ops, "cluster_sum", 2, seed)
        (message,) = (m for m in MAY_HAVE_ENDED if re.search(pattern(m), str(error.value)))
        found.add(message)
    assert found == set(MAY_HAVE_ENDED)


OUTSIDE = "a thread has written outside the 512 bytes of"
OVERRUNS = {
    1: f"by_shared, block (2, 0): {OUTSIDE} dynamic shared memory",
    2: f"by_shared, block (#, 0): {OUTSIDE} dynamic shared memory",
    3: f"by_shared, block (2, 0): {OUTSIDE} static shared memory",
}


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends the process first")
@pytest.mark.parametrize("bug", OVERRUNS)
def test_overruns_of_shared_memory(ops, bug):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=pattern(OVERRUNS[bug])):
            run(ops, "by_shared", bug, seed)


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends the process first")
def test_a_read_past_shared_memory(ops):
    assert not any(run(ops, "by_shared", 4, seed) for seed in SEEDS)


@pytest.mark.skipif(not SANITIZED, reason="not built with AddressSanitizer")
@pytest.mark.parametrize("bug", [1, 2, 3, 4])
def test_overruns_under_address_sanitizer(bug):
    code = (
        f"import torch; torch.ops.load_library({str(path_of('planted_bugs'))!r}); "
        f"x = torch.ones(768); torch.ops.diffusion_ext_planted_bugs.by_shared(x, x, {bug})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_require(ops):
    x = x_of(128)
    x[45] = -1
    with pytest.raises(RuntimeError, match=r"root, block \(0, 0\), thread 45: x is negative"):
        ops.root(torch.empty(128), x, 0)


def test_the_seed_orders_threads_and_blocks(ops):
    def order(seed):
        configure(ops, seed)
        ran, count = torch.full([768], NAN), torch.zeros(1)
        ops.order(ran, count, 0)
        assert torch.equal(ran.sort().values, torch.arange(768.0))  # each thread, once
        return ran.view(6, 128)

    orders = [order(seed) for seed in SEEDS]
    assert torch.equal(order(3), orders[3])
    threads = {tuple(o[0].argsort().tolist()) for o in orders}
    blocks = {tuple(o[:, 0].argsort().tolist()) for o in orders}
    assert len(threads) == len(orders)
    assert len(blocks) > 3


# blocks, blocks_y, threads, cluster, shared_bytes
LAUNCHES = {
    (1, 1, 0, 1, 0): "threads",
    (1, 1, 48, 1, 0): "threads",
    (1, 1, 1056, 1, 0): "threads",
    (0, 1, 32, 1, 0): "blocks",
    (2**31, 1, 32, 1, 0): "blocks",
    (6, 1, 32, 4, 0): "a multiple of the cluster",
    (16, 1, 32, 16, 0): "clusters that the device has",
    (8, 1, 32, 8, 0): "clusters that the device has",
    (1, 0, 32, 1, 0): "blocks_y",
    (1, 65536, 32, 1, 0): "blocks_y",
    (1, 1, 32, 1, 100001): "shared memory",
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_launches_that_a_gpu_refuses(ops, launch):
    configure(ops, 0, shared_bytes=100000, max_cluster=4)
    ops.launch(torch.empty(0), 8, 2, 1024, 4, 100000)
    with pytest.raises(RuntimeError, match=f"nothing: launch: wanted .*{LAUNCHES[launch]}"):
        ops.launch(torch.empty(0), *launch)


def test_a_gpu_that_does_not_exist(ops):
    with pytest.raises(RuntimeError, match="no such GPU"):
        configure(ops, 0, max_cluster=9)
