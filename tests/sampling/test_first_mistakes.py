"""What somebody gets wrong who is new to `sample`: the message names what is at fault, shortly."""

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.checks import shown

SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.ddim(SCHEDULE, 3)
MODEL = dx.nn.ContextUnet(3, 8, 5, 8)
SHAPE = (2, 3, 8, 8)


def draw(model=MODEL, shape=SHAPE, table=TABLE, **options):
    return lambda: dx.sample(model, shape, table, progress=False, **options)


def any_model(x, t, c):
    return x


MISTAKES = [
    # Arguments in another's place.
    (draw(SCHEDULE, MODEL), TypeError, "model: wanted a module .*, got NoiseSchedule"),
    (draw(dx.nn.ContextUnet), TypeError, "model: wanted .*, got the class ContextUnet"),
    (draw(table=SCHEDULE), TypeError, r"table: .* dx.ddim\(schedule.* got NoiseSchedule"),
    (draw(table=dx.ddim), TypeError, "table: wanted a StepTable, .* got function"),
    (draw(shape=TABLE, table=SHAPE), TypeError, "table: wanted a StepTable, .* got tuple"),
    (draw(shape=MODEL), TypeError, r"shape: wanted \(B, C, H, W\), got ContextUnet"),
    (draw(shape=torch.zeros(SHAPE)), TypeError, r"shape: wanted .* got \(tensor|got tuple"),
    # A shape without its batch, or of other images.
    (draw(shape=SHAPE[1:]), ValueError, r"shape: wanted \(B, 3, 8, 8\), .* got \(3, 8, 8\)"),
    (draw(shape=(2, 3, 16, 16)), ValueError, r"shape: wanted \(B, 3, 8, 8\), of this model's"),
    (
        draw(any_model, (3, 8, 8), context=torch.zeros(2, 5)),
        ValueError,
        r"context: wanted 3 rows, the batch of shape \(3, 8, 8\), got \[2, 5\]",
    ),
    # Contexts.
    (draw(context=[0, 1]), TypeError, r"context: wanted class labels, .* got \[0, 1\]"),
    (draw(context=torch.zeros(2)), ValueError, r"labels, int64 \[2\], .* floats \[2, 5\], got a t"),
    (draw(context=torch.tensor([0, 5])), ValueError, "context: wanted values from 0 to 4"),
    (draw(any_model, context=[0, 1]), TypeError, r"got \[0, 1\] without one; torch.tensor"),
    (draw(any_model, context=torch.tensor([0, 1])), TypeError, "function has no n_cfeat"),
    # Devices.
    (draw(device="gpu"), ValueError, "device: wanted a torch device like cpu, got 'gpu'"),
    (draw(noise=torch.zeros(SHAPE)), TypeError, r"noise: .* got Tensor \(x_T takes the noise"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_the_message(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


# "cuda" with an index that no machine has is missing on all of them.
@pytest.mark.parametrize("device", ["cuda:77", "xpu:77", "mtia:77", torch.device("cuda", 77)])
def test_a_device_that_is_not_here(device):
    seeds, message = torch.tensor([1, 2]), "device: wanted one that torch .* such as cpu, got .*77"
    for call in (
        draw(device=device),
        lambda: dx.philox_normal(seeds, (2, 3), device=device),
        lambda: TABLE.tensors(device),
        lambda: TABLE.run_tensors(device, torch.float32),
        lambda: SCHEDULE.tensor("sigma", device),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), 0])
def test_a_gpu_where_there_is_none(device):
    for call in (draw(device=device), lambda: SCHEDULE.tensor("beta", device)):
        with pytest.raises(ValueError, match="device: wanted"):
            call()


def test_a_pipeline_is_no_network():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=[8], norm_num_groups=4, **blocks)
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    whole = "got DDIMPipeline, a pipeline, whose networks are its .unet"
    for call in (
        draw(pipe),
        lambda: dx.fuse(pipe),
        lambda: dx.unfuse(pipe),
        lambda: dx.adapters.from_diffusers(pipe),
    ):
        with pytest.raises(TypeError, match=whole):
            call()


def test_what_a_message_shows():
    assert shown(MODEL) == "ContextUnet"
    assert shown(dx.nn.ContextUnet) == "the class ContextUnet"
    assert shown(torch.zeros(2, 3)) == "a tensor of torch.float32 [2, 3]"
    assert shown("cuda") == "'cuda'"
    assert shown([0, 1]) == "[0, 1]"
    assert shown(list(range(100))) == "list"
    assert shown({"a": torch.zeros(9)}) in (
        "dict",
        "{'a': tensor([0., 0., 0., 0., 0., 0., 0., 0., 0.])}",
    )
