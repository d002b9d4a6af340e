"""Where `sample` has its samples, with a GPU; and a table that several devices use."""

import pytest
import torch
from engine_models import SCHEDULE, SHAPE, TABLES, Network, draw

import diffusion_ext as dx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

CUDA = torch.device("cuda", 0)


def halved(x, t, context):
    return x * 0.5


def test_a_function_gets_its_samples_where_x_T_is():
    x_T = torch.randn(SHAPE)
    ours = draw(halved, x_T=x_T.cuda()).images
    assert ours.device == CUDA
    torch.testing.assert_close(ours.cpu(), draw(halved, x_T=x_T).images)
    assert draw(halved, x_T=x_T.cuda(), device="cpu").images.is_cpu
    assert draw(halved).images.is_cpu
    with torch.device("cuda"):
        assert draw(halved).images.device == CUDA


@pytest.mark.parametrize("engine", ["eager", "graph", "trace"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")], ids=repr)
def test_every_name_of_a_device(device, engine):
    model = Network()
    expected = draw(model, context=torch.tensor([0, 2])).images
    for context in (torch.tensor([0, 2]), torch.tensor([0, 2]).cuda()):
        ours = draw(model.cuda(), context=context, device=device, engine=engine).images
        assert ours.device == CUDA
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "make", [dx.ddpm, dx.dpmpp_2m, dx.dpmpp_sde, dx.plms, dx.sa_solver, dx.unipc]
)
@pytest.mark.parametrize("engine", ["eager", "graph", "trace"])
def test_samplers_are_those_of_the_cpu(make, engine):
    table = make(dx.NoiseSchedule.linear(6)) if make is dx.ddpm else make(SCHEDULE, 6)
    model, options = Network(), {"table": table, "context": torch.rand(2, 3), "save_rate": 1}
    for scale in (1.0, 2.0):
        expected = draw(model.cpu(), guidance_scale=scale, **options)
        ours = draw(model.cuda(), guidance_scale=scale, engine=engine, **options)
        for actual, wanted in ((ours.images, expected.images), (ours.frames, expected.frames)):
            most = wanted.abs().max().item()
            torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-3, atol=1e-3 * most)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_a_second_gpu(engine):
    """While the first is current, and as the current one, with a table that both have used."""
    first, second = Network().cuda(), Network().to("cuda:1")
    second.load_state_dict(first.state_dict())
    expected = draw(first, device="cuda", engine=engine).images
    ours = draw(second, seeds=torch.arange(2, device="cuda:0"), engine=engine).images
    assert ours.device == torch.device("cuda", 1)
    assert torch.equal(ours.cpu(), expected.cpu())
    with torch.cuda.device(1):
        assert torch.equal(draw(second, device="cuda", engine=engine).images, ours)
    assert torch.equal(draw(first, device="cuda", engine=engine).images, expected)


@pytest.mark.parametrize("generator", ["cpu", "cuda"])
def test_noise_of_a_generator(generator):
    noise = torch.Generator(generator)
    model = Network().cuda()
    first, second = (draw(model, TABLES["noise"], noise=noise.manual_seed(5)) for _ in "ab")
    assert first.images.device == CUDA
    assert torch.equal(first.images, second.images)
