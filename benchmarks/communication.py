"""What training on many GPUs sends, and the efficiency that allows: worked out, not measured.

    python -m benchmarks.communication [--plot FILE.png]

Parameters and FLOPs are counted here, on torch's meta device. The rest is assumed and said:

* H100s at 40 % of their bfloat16 peak; a step is three forward passes' work (Kaplan et al. 2020).
* Gradients of float32. A ring sends 2(N-1)/N of them per GPU and step (Patarasuk & Yuan 2009); with
  parameters in parts 3(N-1)/N: two gatherings and one reduction (Rajbhandari et al. 2020).
* Links at 80 % of their rate. Within a node NVLink, 450 GB/s a GPU; a ring through several nodes is
  as fast as the network adapters of one node together.
* Transfers go on during the backward pass, two thirds of a step, but for the last bucket. What is
  longer than that is waited for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import diffusion_ext as dx

GPUS = (8, 64, 512)
PER_NODE = 8
FLOPS = 0.4 * 989e12  # a second
REACHED = 0.8  # of a link's rate
NVLINK = 450e9  # bytes a second, each GPU
NETWORKS = {"8 x 400 Gb/s a node": 400e9, "1 x 100 Gb/s a node": 12.5e9}
BACKWARD = 2 / 3
BUCKET = 25 * 2**20  # bytes, DDP's


@dataclass(frozen=True)
class Work:
    """A network's training: parameters, FLOPs of a step on one GPU, images in it."""

    name: str
    parameters: int
    flops: float
    images: int

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS

    def sent(self, gpus: int, sharded: bool = False) -> float:
        """Bytes that a GPU sends in a step."""
        return (3 if sharded else 2) * (gpus - 1) / gpus * 4 * self.parameters

    def efficiency(self, gpus: int, network: float, sharded: bool = False) -> float:
        """The share of a step in which a GPU computes. network: bytes a second of a node."""
        rate = REACHED * (NVLINK if gpus <= PER_NODE else min(NVLINK, network))
        transfer = self.sent(gpus, sharded) / rate
        last = min(BUCKET / (4 * self.parameters), 1) * transfer
        waited = max(transfer - last - BACKWARD * self.seconds, 0) + last
        return self.seconds / (self.seconds + waited)


def counted(name: str, network: torch.nn.Module, images: int, *inputs) -> Work:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), dx.use_backend("reference"):
        network.eval()(*inputs)
    parameters = sum(p.numel() for p in network.parameters())
    return Work(name, parameters, 3.0 * counter.get_total_flops(), images)


def networks() -> list[Work]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        course = dx.nn.ContextUnet(3, 256, 10, 32, norm="group")
        x, t, c = torch.empty(64, 3, 32, 32), torch.empty(64), torch.empty(64, 10)
        stable = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        latents, text = torch.empty(8, 4, 64, 64), torch.empty(8, 77, 768)
        time = torch.empty(8)
        return [
            counted("ContextUnet, n_feat 256, 64 images 3x32x32 a GPU", course, 64, x, t, c),
            counted("Stable Diffusion 1.5's UNet, 8 latents 4x64x64 a GPU", stable, 8,
                    latents, time, text),
        ]  # fmt: skip


def table(works: list[Work]) -> str:
    lines = []
    for work in works:
        lines += [
            f"**{work.name}**: {work.parameters / 1e6:.1f} M parameters, {work.flops / 1e12:.2f} "
            f"TFLOP and {1000 * work.seconds:.1f} ms a step",
            "",
            "| GPUs | sent a GPU and step | with --shard | "
            + " | ".join(f"{name}{', --shard' * s}" for name in NETWORKS for s in (0, 1))
            + " |",
            "|---|---|---|" + "---|" * (2 * len(NETWORKS)),
        ]
        for gpus in GPUS:
            shares = [work.efficiency(gpus, r, bool(s)) for r in NETWORKS.values() for s in (0, 1)]
            sent = [f"{work.sent(gpus, sharded) / 1e6:.0f} MB" for sharded in (False, True)]
            cells = [str(gpus), *sent, *(f"{share:.0%}" for share in shares)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(works: list[Work], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(works), figsize=(10, 3.6), layout="constrained", sharey=True)
    counts = [8, 16, 32, 64, 128, 256, 512]
    for axis, work in zip(axes, works, strict=True):
        for name, rate in NETWORKS.items():
            for sharded, style in ((False, "-"), (True, "--")):
                shares = [100 * work.efficiency(n, rate, sharded) for n in counts]
                label = f"{name}{', --shard' if sharded else ''}"
                axis.plot(counts, shares, style, marker="o", markersize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.set_ylim(0, 105)
        axis.set_xlabel("GPUs")
        axis.set_title(work.name.replace(", ", "\n", 1), fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of a step that computes, %")
    axes[0].legend(fontsize=8)
    figure.suptitle("Worked out, not measured", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    works = networks()
    print(table(works))
    if options.plot:
        plot(works, options.plot)


if __name__ == "__main__":
    main()
