"""What the other tests rest on: the backend that was chosen is the one that serves."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(10)


class Dispatched(TorchDispatchMode):
    """The ops of this package that torch dispatches: (namespace, name, device of the result)."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("diffusion_ext"):
            self.ops.add((func.namespace, func._opname, args[0].device.type))
        return func(*args, **(kwargs or {}))


def test_the_chosen_backend_serves(backend):
    x, t = torch.randn(2, 4, 3, 3), torch.tensor([1, 10])
    tensors = dx.ddpm(SCHEDULE).tensors(x.device)
    with Dispatched() as dispatched:
        dx.philox_normal(t, (2, 3))
        dx.perturb(x, t, SCHEDULE)
        dx.sampler_step(x, x, *tensors, torch.tensor(0))
        dx.group_norm_act(x.requires_grad_(), 2).sum().backward()
    names = ["philox_normal_", "perturb", "sampler_step", "group_norm_act"]
    names = [] if backend == "reference" else [*names, "group_norm_act_backward"]
    device = "cuda" if backend == "cuda" else "cpu"
    assert dispatched.ops == {("diffusion_ext", name, device) for name in names}
