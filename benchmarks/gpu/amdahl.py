"""Predicts what fusing can gain in whole networks: prints the tables of docs/kernels.md.

    python -m benchmarks.gpu.amdahl

Shapes are those of the networks themselves, on the meta device. Each convolution, product and
attention takes the longer of its operations at the GPU's rate and its bytes at its bandwidth; a
GroupNorm with its activation takes 5 passes over its input eagerly (two reads and a write, a read
and a write) and 2 fused; a BatchNorm and a GELU 2 each; a sampler's step takes LAUNCH a kernel, its
tensors being small. What else a network does (residual sums, concatenations, embeddings) takes a
pass over the output of each convolution and product.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..networks import CONTEXT, Networks
from .diffusion_models import Decoding, Denoising
from .report import table

LAUNCH = 3e-6
STEP_KERNELS = 12  # of an eager DDIM step


@dataclass(frozen=True)
class Gpu:
    """Operations and bytes a second in bfloat16, as libraries reach them in networks."""

    name: str
    rate: float
    bandwidth: float


# The rate is 63 % of the 790 TFLOP/s of one large product, which both GPUs, of the same
# multiprocessors, are taken to reach; the bandwidth 87 % of a copy's 3.0 and 4.3 TB/s.
GPUS = (Gpu("H100", 500e12, 2.6e12), Gpu("H200", 500e12, 3.7e12))


@dataclass(frozen=True)
class Sampling:
    """A step of sampling with a ContextUnet."""

    networks: Networks

    @property
    def name(self) -> str:
        of = self.networks
        return f"ContextUnet, n_feat {of.n_feat}, {of.batch} of {of.height}x{of.height}, a step"

    def model(self, dtype: torch.dtype) -> nn.Module:
        return self.networks.source_model(dtype)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        batch = self.networks.batch
        return (
            torch.empty(self.networks.case.shape),
            torch.empty(batch),
            torch.empty(batch, CONTEXT),
        )

    def once(self, model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        return model(*inputs)


@dataclass
class Cost:
    """Seconds by kind."""

    products: float = 0
    norms: float = 0
    others: float = 0
    step: float = 0

    @property
    def all(self) -> float:
        return self.products + self.norms + self.others + self.step


def bytes_of(*tensors) -> int:
    return sum(2 * t.numel() for t in tensors)


def layers_cost(model: nn.Module, call, gpu: Gpu) -> Cost:
    """Of a call on the meta device, eagerly."""
    cost, flops = Cost(), []  # of the layers; the rest of the operations are attention's

    def layer(module, inputs, output):
        if isinstance(module, nn.GroupNorm):
            cost.norms += 5 * bytes_of(output) / gpu.bandwidth
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            moved = bytes_of(*inputs, output, *module.parameters())
            transposed = isinstance(module, nn.ConvTranspose2d)
            products = (inputs[0] if transposed else output).numel() * module.weight[0].numel()
            flops.append(2 * products)
            cost.products += max(flops[-1] / gpu.rate, moved / gpu.bandwidth)
            cost.others += bytes_of(output) / gpu.bandwidth
        elif isinstance(module, (nn.BatchNorm2d, nn.GELU)):
            cost.others += 2 * bytes_of(output) / gpu.bandwidth

    for module in model.modules():
        module.register_forward_hook(layer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    cost.products += max(counter.get_total_flops() - sum(flops), 0) / gpu.rate
    return cost


def cost_of(work, gpu: Gpu) -> tuple[Cost, Cost]:
    """(eager, with norms and step fused) of one call of the network."""
    with torch.device("meta"):
        model = work.model(torch.bfloat16)
        inputs = [torch.empty(t.shape, dtype=torch.bfloat16) for t in work.inputs()]
        eager = layers_cost(model, lambda: work.once(model, *inputs), gpu)
    if not isinstance(work, Decoding):
        eager.step = STEP_KERNELS * LAUNCH
    fused = Cost(eager.products, eager.norms * 2 / 5, eager.others, min(eager.step, LAUNCH))
    return eager, fused


def works() -> list:
    sizes = ((64, 16), (256, 28))
    found = [Sampling(Networks("meta", n_feat=n, height=height)) for n, height in sizes]
    return [*found, Denoising("meta", 64), Decoding("meta", 512), Decoding("meta", 1024)]


def rows(works: list, gpu: Gpu) -> list[list[str]]:
    found = []
    for work in works:
        eager, fused = cost_of(work, gpu)
        share = (eager.norms + eager.step) / eager.all
        cells = [f"{1e3 * t:.2f}" for t in (eager.products, eager.norms, eager.step, eager.others)]
        gains = (1 / (1 - share), eager.all / fused.all)
        cells += [f"{100 * share:.0f} %", *(f"{gain:.2f}" for gain in gains)]
        found.append([work.name, *cells])
    return found


def main() -> int:
    heads = [
        "network",
        "products, ms",
        "norms",
        "step",
        "rest",
        "our share",
        "at most",
        "predicted",
    ]
    for gpu in GPUS:
        heads[0] = f"network, on an {gpu.name}"
        print(table(heads, rows(works(), gpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
