"""The stand-in for CUDA has a GPU's errors: bugs planted for the purpose are found."""

import pytest
import stand_in_gpu
import torch
from harness import waits_are_errors
from torch import nn

import diffusion_ext as dx
from diffusion_ext.ops.backend import kernels

SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.ddim(SCHEDULE, 10)


def waits() -> int:
    return torch.ops.stand_in_gpu.waits()


def launches(stream: torch.Stream) -> int:
    return torch.ops.stand_in_gpu.launches(stream.device_index, stream.stream_id)


@pytest.fixture
def x():
    return torch.randn(2, 4, 8, 8, device="cuda")


# --- devices --------------------------------------------------------------------------------------


def test_tensors_say_where_they_are():
    with torch.device("cuda"):
        made = [torch.zeros(2), torch.arange(3), torch.tensor([1.0]), torch.randn(2), torch.eye(2)]
    for tensor in (*made, made[0].expand(3, 2), made[0] + 1, torch.ones(2).cuda()):
        assert tensor.is_cuda
        assert tensor.device == torch.device("cuda:0")
    assert torch.empty(1, device="cuda:1").device == torch.device("cuda:1")
    assert made[1].cpu().tolist() == [0, 1, 2]
    assert not torch.zeros(2).is_cuda


def test_a_view_shares_its_memory(x):
    x.view(-1)[3:5].fill_(7)
    assert (x.flatten()[3:5] == 7).all()
    assert x.transpose(0, 1).data_ptr() == x.data_ptr()
    x.resize_(1000).zero_()
    assert x.sum().item() == 0


@pytest.mark.parametrize("other", [torch.ones(8), torch.ones(8, device="cuda:1")], ids=str)
def test_tensors_of_two_devices(x, other):
    for call in (lambda: x + other, lambda: x @ other, lambda: torch.stack([x[0, 0, 0], other])):
        with pytest.raises(RuntimeError, match="same device, but found at least two devices"):
            call()


def test_what_a_gpu_takes_of_the_cpu(x):
    assert (x + torch.tensor(1.0)).is_cuda
    assert x[torch.tensor([0, 1])].is_cuda
    assert x.copy_(torch.zeros(8)).is_cuda


def test_a_cpu_tensor_beside_the_sample(x):
    """In our wrappers, and in the kernels past them."""
    tables, row = TABLE.tensors(x.device), torch.tensor(0, device="cuda")
    with pytest.raises(ValueError, match="noise: wanted a tensor on cuda:0, got one on cpu"):
        dx.sampler_step(x, x, *tables, row, noise=x.cpu())
    with pytest.raises(ValueError, match="model_output: wanted a tensor on cuda:0"):
        dx.sampler_step(x, x.cpu(), *tables, row)
    with pytest.raises(ValueError, match="weight: wanted a tensor on cuda:0"):
        dx.group_norm_act(x, 2, weight=torch.ones(4))
    with pytest.raises(RuntimeError, match="seeds: wanted x's device"):
        kernels().philox_normal_(x, torch.tensor([1, 2]), 0, 0)


def test_a_generator_of_the_cpu():
    for make in (torch.randn, torch.rand):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            make(3, device="cuda", generator=torch.Generator())
    draw = torch.Generator("cuda")
    first, second = (torch.randn(3, generator=draw.manual_seed(5), device="cuda") for _ in "ab")
    assert torch.equal(first, second)


def test_numpy(x):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_an_op_without_a_cuda_kernel():
    with pytest.raises(NotImplementedError, match=r"conv3x3_filters.*'CUDA' backend"):
        kernels().conv3x3_filters(torch.ones(8, 8, 3, 3, device="cuda"))


# --- waits ----------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to("cuda"),
    "nonzero": lambda x: x.nonzero(),
    "by a mask": lambda x: x[x > 0],
    "set by a mask": lambda x: x.__setitem__(x > 0, torch.zeros(1, device="cuda")),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream": lambda x: torch.cuda.current_stream().synchronize(),
}
DOES_NOT = {
    "sum": lambda x: x.sum(),
    "without blocking": lambda x: x.to("cpu", non_blocking=True),
    "by indices": lambda x: x[torch.zeros(3, dtype=torch.int64, device="cuda")],
    "made there": lambda x: torch.zeros(3, device="cuda"),
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits(x, name):
    before = waits()
    WAITS[name](x)
    assert waits() > before
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITS[name](x)


@pytest.mark.parametrize("name", DOES_NOT)
def test_what_does_not_wait(x, name):
    before = waits()
    with waits_are_errors():
        DOES_NOT[name](x)
    assert waits() == before


class Waits(nn.Module):
    """A network that looks at its own output."""

    def forward(self, x, t, context=None):
        return x * 0.5 if x.sum().item() > 0 else x


def test_a_wait_in_a_step():
    """Sampling promises none of its own; one of the network's is found."""
    options = {"seeds": torch.arange(2, device="cuda"), "progress": False, "engine": "eager"}
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        dx.sample(Waits(), (2, 3, 8, 8), TABLE, device="cuda", **options)


def test_a_copy_to_pinned_memory_arrives_when_it_is_waited_for(x):
    """By an event, a stream, the device; or when an event says that it is there."""
    event = torch.cuda.Event()
    for wait in (
        event.synchronize,
        event.query,
        torch.cuda.current_stream().synchronize,
        torch.cuda.synchronize,
    ):
        there = torch.zeros(x.shape, pin_memory=True)
        there.copy_(x, non_blocking=True)
        event.record()
        assert there.isnan().all()
        wait()
        assert torch.equal(there, x.cpu())
    event.record()
    later = torch.zeros(x.shape, pin_memory=True).copy_(x, non_blocking=True)
    event.synchronize()
    assert later.isnan().all()  # it began after the event
    torch.cuda.synchronize()
    assert torch.equal(torch.zeros(x.shape).copy_(x, non_blocking=True), x.cpu())  # not pinned


# --- streams and graphs ---------------------------------------------------------------------------


def test_a_launch_is_on_the_current_stream(x):
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (one, other, torch.cuda.current_stream()):
        counts = [launches(s) for s in (one, other)]
        with torch.cuda.stream(stream):
            dx.group_norm_act(x, 2)
        found = [launches(s) - count for s, count in zip((one, other), counts, strict=True)]
        assert [n > 0 for n in found] == [stream == one, stream == other]


def captured(body):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = body()
    return graph, result


def test_a_graph(x):
    """Computes nothing while it is captured, then what its inputs are at each replay."""
    expected_x = x.clone()

    def body():
        y = dx.group_norm_act(x * 2, 2).flatten(2)
        x.add_(1)
        return y, y[:, :1]

    graph, (y, view) = captured(body)
    assert torch.equal(x, expected_x)
    assert y.isnan().all()
    for _ in range(2):
        expected = dx.group_norm_act(x * 2, 2).flatten(2)
        graph.replay()
        assert torch.equal(y, expected)
        assert torch.equal(view, expected[:, :1])
        assert torch.equal(x, expected_x.add_(1))


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_in_a_capture(x, name):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: WAITS[name](x))
    assert torch.equal(captured(lambda: x)[1], x)  # the device is as usable as before


class Item(torch.autograd.Function):
    """A backward that waits, in a thread of autograd's own."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


def test_a_wait_in_a_captured_backward(x):
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: torch.autograd.grad(Item.apply(x).sum(), x))


def test_another_stream_in_a_capture(x):
    other = torch.cuda.Stream()

    def body(call):
        with torch.cuda.stream(other):
            return call()

    for call in (lambda: x + 1, lambda: dx.group_norm_act(x, 2)):
        with pytest.raises(RuntimeError, match="while another stream is captured"):
            captured(lambda call=call: body(call))


def test_memory_is_counted(x):
    before = torch.cuda.memory_allocated()
    held = torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() == before + held.nbytes
    del held
    assert torch.cuda.memory_allocated() == before


def test_what_it_is_called():
    assert torch.cuda.get_device_name() == stand_in_gpu.NAME
    assert (torch.cuda.device_count(), torch.cuda.get_device_capability()) == (2, (9, 0))
