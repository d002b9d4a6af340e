"""Networks beyond one device's memory: each process holds a part of each tensor (torch's FSDP2).

What of torch does this takes 0.7 s to import, so it is imported where a network is cut.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from .processes import Processes

UNIT_SHARE = 1 / 8  # of the parameters, at most, that are gathered at once


class Shards:
    """How a network is cut, so that its average is cut alike; all have the first one's weights.

    Parameters are gathered unit by unit, when one is called: each of the largest modules that have
    an eighth of the parameters at most and are called as such, and the rest.

    Args: output: calls the network, in whatever mode: it tells which modules are called.
    """

    def __init__(self, network: nn.Module, output, device: torch.device, processes: Processes):
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (processes.count,))
        called: set[nn.Module] = set()
        watch = nn.modules.module.register_module_forward_pre_hook(lambda m, _: called.add(m))
        try:
            output()
        finally:
            watch.remove()
        self.units = _units(network, called)
        network.to(memory_format=torch.contiguous_format)  # all that torch can send and cut
        processes.copy_first([*network.parameters(), *network.buffers()])

    def cut(self, network: nn.Module) -> None:
        """Makes DTensors of the parameters of the network, or of a copy of it."""
        from torch.distributed.fsdp import fully_shard

        for name in self.units:
            fully_shard(network.get_submodule(name), mesh=self.mesh)
        fully_shard(network, mesh=self.mesh)
        for module in (network, *map(network.get_submodule, self.units)):
            module.set_gradient_divide_factor(1.0)  # a sum, as GradientSum has
            module.set_force_sum_reduction_for_comms(True)


def _units(network: nn.Module, called: set[nn.Module]) -> list[str]:
    """The names of the modules that are gathered by themselves."""
    most = UNIT_SHARE * _size(network)
    units, waiting = [], list(network.named_children())
    while waiting:
        name, module = waiting.pop()
        if module in called and 0 < _size(module) <= most:
            units.append(name)
        else:
            waiting += [(f"{name}.{child}", inner) for child, inner in module.named_children()]
    return units


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _class_of_torch(module: str, name: str) -> type | tuple[()]:
    """One of torch.distributed's, or () where nobody has imported it: nothing is of it then."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, _class_of_torch("tensor", "DTensor"))


def class_name(network: nn.Module) -> str:
    """The user's, of which a cut network's class is made."""
    cut = _class_of_torch("fsdp", "FSDPModule")
    return next(c.__name__ for c in type(network).__mro__ if not issubclass(c, cut))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which elementwise work may go on with."""
    return tensor.to_local() if is_cut(tensor) else tensor


def whole(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Tensors of all processes together, on the first one's host; one after another, for together
    they may be too large for a device. Every process has to ask."""
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_cut(tensor) else tensor
        if processes.first:
            gathered[name] = full.cpu()
    return gathered


def laid_as(value: Tensor, target: Tensor) -> Tensor:
    """A new tensor of value's numbers, cut and laid out as target."""
    if is_cut(target) and not is_cut(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements)
    return torch.empty_like(target, requires_grad=False).copy_(value)
