"""Single steps and tables on a GPU: no wait, and the GPU that is current."""

import pickle

import pytest
import torch
from harness import waits_are_errors

import diffusion_ext as dx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

SCHEDULE = dx.NoiseSchedule.linear(50)


def steps(device):
    """Every kind of timestep: of the host, of the device, one or one for each sample."""
    x = torch.ones(4, 3, 8, 8, device=device)
    each = torch.tensor([5, 6, 7, 8], device=device)
    for row in (5, each[0], each):
        yield dx.sampler_step(x, 0.5 * x, dx.ddpm(SCHEDULE), row, seeds=3)
    for t in (5, each[0], each):
        yield dx.ddpm_step(x, 0.5 * x, t, SCHEDULE, seeds=3)
        yield dx.perturb(x, t, SCHEDULE, seeds=3)[0]
        yield dx.denoising_loss(0.5 * x, x, t, SCHEDULE, seeds=3)
        for t_prev in (4, each[0] - 1, each - 1 if t is each else 4):
            yield dx.ddim_step(x, 0.5 * x, t, t_prev, SCHEDULE)


def test_a_step_waits_for_nothing():
    warm, expected = list(steps("cuda")), list(steps("cpu"))
    with waits_are_errors():
        x = torch.ones(4, 3, 8, 8, device="cuda")
        each = torch.tensor([5, 6, 7, 8]).to("cuda", non_blocking=True)
        dx.ddim_step(x, x, each, 4, SCHEDULE)
        dx.ddim_step(x, x, 9, each, SCHEDULE)
        dx.ddpm_step(x, x, each, SCHEDULE, seeds=3)
        dx.denoising_loss(x, x, torch.tensor([5, 6, 7, 8]), SCHEDULE, seeds=torch.arange(4))
        table = dx.dpmpp_2m_sde(SCHEDULE, 4)  # whose first step takes it to the GPU
        slots = table.new_slots(x)
        for i in range(4):
            x = dx.sampler_step(x, x, table, i, seeds=3, slots=slots)
    for ours, theirs in zip(warm, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_a_file_is_of_no_device():
    """What was used on a GPU is read where there is none."""
    table = dx.ddim(SCHEDULE, 5)
    expected = *(t.cpu() for t in table.tensors("cuda")), SCHEDULE.tensor("sigma", "cuda").cpu()
    file = pickle.dumps((table, SCHEDULE))
    assert b"cuda" not in file
    table, schedule = pickle.loads(file)
    found = *table.tensors("cpu"), schedule.tensor("sigma", "cpu")
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants two GPUs")
def test_tables_are_on_the_current_gpu():
    table = dx.ddim(SCHEDULE, 5)
    for index in (0, 1, 0):
        with torch.cuda.device(index):
            for tensor in (*table.tensors("cuda"), SCHEDULE.tensor("alpha_bar", "cuda")):
                assert tensor.device == torch.device("cuda", index)
