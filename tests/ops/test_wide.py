"""float64 of what lies on a device that has none, as Apple's GPUs: computed on the CPU.

No such device is here: the CPU is taken for one, for which every place has to give what it gave.
"""

import pathlib
import re

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.ops import wide

pytestmark = pytest.mark.backends("cpu")
PACKAGE = pathlib.Path(dx.__file__).parent


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "meta"])
def test_where_float64_is_computed(kind):
    expected = "cpu" if kind == "mps" else kind
    assert wide.wide_device(torch.device(kind)) == torch.device(expected)


def test_a_tensor_stays_where_float64_is():
    assert wide.wide(torch.empty(3, device="meta")).device.type == "meta"
    x = torch.tensor([1.0, 1 / 3])
    assert torch.equal(wide.wide(x), x.double())


def results():
    schedule, x = dx.NoiseSchedule.linear(100), torch.randn(2, 3, 16, 16)
    t, before = torch.tensor([50, 70]), torch.tensor([10, 0])
    with dx.use_backend("reference"):
        yield dx.philox_normal(7, x.shape)
        yield dx.ddim_step(x, x, t, before, schedule, eta=0.5, seeds=3)
    model = dx.nn.ContextUnet(3, 16, 5, 16).eval()
    network = dx.optimize_for_sampling(model, memory_format=torch.contiguous_format)
    yield network(x, t / 100)


def test_the_results_are_the_same(monkeypatch):
    torch.manual_seed(0)
    expected = list(results())
    monkeypatch.setattr(wide, "NARROW", ("cpu",))
    torch.manual_seed(0)
    for ours, other in zip(results(), expected, strict=True):
        assert torch.equal(ours, other)


# What is on the CPU already: tables, measures, what diffusers keeps, BatchNorms of our kernel.
ON_THE_CPU = {
    "nn/batch_norm_act.py", "samplers/schedules.py", "fusing/diffusers_blocks.py",
    "training/evaluation/evaluate.py", "training/evaluation/features.py",
    "training/evaluation/measures.py", "integrations/k_diffusion.py",
    "integrations/diffusers/tracing.py", "integrations/diffusers/traced.py",
}  # fmt: skip


def test_no_other_place_takes_a_tensor_to_float64():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\.double\(\)", path.read_text())
    }
    assert found == ON_THE_CPU
