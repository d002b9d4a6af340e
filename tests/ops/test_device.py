"""What a device has beside memory: graphs, streams, neighbours; and the same bits in every run."""

import pytest
import torch
from calls import copy_into, every_call
from harness import TOLERANCE, same_bits

CASES = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.bfloat16, "misaligned contiguous"),
    ],
)


def assert_same(ours, theirs, name):
    assert len(ours) == len(theirs)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True)), name


@pytest.mark.backends("cpu", "cuda")
@CASES
def test_every_run_has_the_same_bits(dtype, layout):
    for name, call in every_call(dtype, layout).items():
        inputs = call.draw()
        first = call.run(**inputs)
        for _ in range(2):
            assert_same(call.run(**inputs), first, name)


@pytest.mark.backends("cpu")
@CASES
def test_any_number_of_threads_has_the_same_bits(dtype, layout):
    before = torch.get_num_threads()
    try:
        for name, call in every_call(dtype, layout, shape=(3, 8, 48, 40)).items():
            inputs, results = call.draw(), []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(call.run(**inputs))
            for result in results[1:]:
                assert_same(result, results[0], name)
    finally:
        torch.set_num_threads(before)


def captured(call, inputs):
    """A graph of the call, and where it leaves its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a process does once, it does before the capture
        call.run(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call.run(**inputs)
    return graph, outputs


@pytest.mark.backends("cuda")
@CASES
def test_graphs(dtype, layout):
    """A replay reads what is in device memory by then: samples, seeds, timesteps, rows."""
    for name, call in every_call(dtype, layout).items():
        inputs = call.draw()
        graph, outputs = captured(call, inputs)
        for _ in range(2):
            others = call.draw()
            expected = call.run(**others)
            copy_into(inputs, others)
            graph.replay()
            assert_same(outputs, expected, name)


@pytest.mark.backends("cuda")
@CASES
def test_streams(dtype, layout):
    for name, call in every_call(dtype, layout).items():
        inputs, others = call.draw(), call.draw()
        expected = call.run(**others)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Kernels on another stream would not wait for this, and read the inputs too early.
            torch.cuda._sleep(5_000_000)
            copy_into(inputs, others)
            outputs = call.run(**inputs)
        torch.cuda.synchronize()
        assert_same(outputs, expected, name)


@pytest.mark.backends("cuda")
@CASES
def test_a_device_that_is_not_the_current_one(dtype, layout):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    for name, call in every_call(dtype, layout).items():
        inputs = call.draw()
        with torch.device("cuda:1"):
            elsewhere = call.draw()
        copy_into(elsewhere, inputs)
        outputs = call.run(**elsewhere)
        assert torch.cuda.current_device() == 0
        for ours, theirs in zip(outputs, call.run(**inputs), strict=True):
            assert ours.device == torch.device("cuda:1")
            atol = 4 * TOLERANCE[dtype] * theirs.abs().max().item()  # another GPU, another plan
            torch.testing.assert_close(ours.to(theirs.device), theirs, rtol=0, atol=atol, msg=name)
