"""A training step and an epoch beside other people's loops, each with the same network.

    pip install denoising-diffusion-pytorch einops ema-pytorch   # the first with --no-deps
    python -m benchmarks.training_loops [--rounds 3] [--json FILE]

Every loop trains a ContextUnet (n_feat 64) on 640 pictures 3x16x16, 32 at a time, and does what it
does by itself: data loader, loss on the progress bar, moving average, clipping. Ours has its own
network; the others have benchmarks.source's, in plain torch, and so has the row "ours, their
network". Each runs in a process of its own, one after the other, in rounds; of each the best round
counts. Memory: the process's peak, less what it had before the network was built.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import diffusion_ext as dx
from diffusion_ext.training import ImageData, Trainer, TrainingConfig

from . import source
from .device import cpu_name

IMAGES, BATCH, SIDE, CLASSES, FEATURES, TIMESTEPS = 640, 32, 16, 5, 64, 500
EPOCHS = 3  # the first warms up
SIZES = {"in_channels": 3, "n_feat": FEATURES, "n_cfeat": CLASSES, "height": SIDE}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """images [640,3,16,16] in [-1, 1], contexts [640,5]"""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator) * 2 - 1
    return images, torch.eye(CLASSES)[torch.arange(IMAGES) % CLASSES]


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=BATCH, shuffle=True)


# --- the loops: each calls tick after every step --------------------------------------------------


def by_source(tick, compiled: bool = False) -> None:
    """The course's notebook."""
    network = source.ContextUnet(**SIZES)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    alpha_bar, loss_of = source.Tables(TIMESTEPS).alpha_bar, source.loss_of
    loss_of = torch.compile(loss_of) if compiled else loss_of
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / EPOCHS)
        for x, context in tqdm(loader(), mininterval=2):
            context = context * torch.bernoulli(torch.full((len(x), 1), 0.9))
            t = torch.randint(1, TIMESTEPS + 1, (len(x),))
            source.training_step(network, optimizer, x, t, context, alpha_bar, loss_of=loss_of)
            tick()


def by_source_compiled(tick) -> None:
    by_source(tick, compiled=True)


class WithoutContext(nn.Module):
    """The source's network as denoising-diffusion-pytorch and diffusers' script call theirs."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.network = source.ContextUnet(**SIZES)

    def forward(self, x, t, _=None):
        return self.network(x, t.float() / TIMESTEPS, x.new_zeros(len(x), CLASSES))


def by_lucidrains(tick) -> None:
    """denoising-diffusion-pytorch: its GaussianDiffusion, and what its Trainer does in a step."""
    without_torchvision()
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(
        WithoutContext(), image_size=SIDE, timesteps=TIMESTEPS, objective="pred_noise"
    )
    accelerator = Accelerator()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    diffusion, optimizer = accelerator.prepare(diffusion, optimizer)
    for _ in range(EPOCHS):
        bar = tqdm(loader(), mininterval=2)
        for x, _ in bar:
            diffusion.train()
            with accelerator.autocast():
                loss = diffusion((x + 1) / 2)
            shown = loss.item()
            accelerator.backward(loss)
            bar.set_description(f"loss: {shown:.4f}")
            accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            tick()


def by_diffusers(tick) -> None:
    """diffusers' example for unconditional images, with its defaults."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator, noising = Accelerator(), DDPMScheduler(num_train_timesteps=TIMESTEPS)
    network = WithoutContext()
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    steps = EPOCHS * IMAGES // BATCH
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=steps)
    network, optimizer, loaded, rates = accelerator.prepare(network, optimizer, loader(), rates)
    for _ in range(EPOCHS):
        network.train()
        bar = tqdm(total=len(loaded), mininterval=2)
        for x, _ in loaded:
            noise = torch.randn(x.shape)
            t = torch.randint(0, TIMESTEPS, (len(x),)).long()
            noisy = noising.add_noise(x, noise, t)
            with accelerator.accumulate(network):
                loss = F.mse_loss(network(noisy, t).float(), noise.float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            average.step(network.parameters())
            bar.update(1)
            bar.set_postfix(loss=loss.detach().item(), lr=rates.get_last_lr()[0])
            tick()


def by_ours(tick, network: nn.Module | None = None, **options) -> None:
    """Trainer, as it is."""

    network = network or dx.nn.ContextUnet(**SIZES)
    length = {"epochs": EPOCHS, "checkpoint_every": EPOCHS, "samples_every": 0}
    config = TrainingConfig(batch_size=BATCH, **length, **options)
    schedule = dx.NoiseSchedule.linear(TIMESTEPS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(network, schedule, ImageData(*data()), folder, config)
        update = trainer.learner.update

        def ticked(*arguments):
            norm = update(*arguments)
            tick()
            return norm

        trainer.learner.update = ticked
        trainer.fit()


def by_ours_with_their_network(tick) -> None:
    by_ours(tick, source.ContextUnet(**SIZES))


def by_ours_clipped(tick) -> None:
    by_ours(tick, clip_gradient=1.0)


LOOPS = {
    "source": by_source,
    "source, torch.compile": by_source_compiled,
    "denoising-diffusion-pytorch": by_lucidrains,
    "diffusers' example": by_diffusers,
    "ours": by_ours,
    "ours, clipping as those two": by_ours_clipped,
    "ours, their network": by_ours_with_their_network,
}


def without_torchvision() -> None:
    """denoising-diffusion-pytorch imports it for folders of pictures, which nobody reads here."""
    if importlib.util.find_spec("torchvision") is None:
        stub = types.ModuleType("torchvision")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
        stub.transforms = stub.utils = types.ModuleType("stub")
        sys.modules["torchvision"] = stub


# --- measuring ------------------------------------------------------------------------------------


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict:
    """One loop in this process: the last epoch's steps, milliseconds, and the memory."""
    torch.manual_seed(0)
    warm = torch.rand(8, 8) @ torch.rand(8, 8)  # what torch starts once is not the loop's
    before, times = peak_megabytes() + 0 * warm.sum().item(), [time.perf_counter()]
    LOOPS[name](lambda: times.append(time.perf_counter()))
    steps = IMAGES // BATCH
    last = torch.tensor(times[-steps - 1 :], dtype=torch.float64)
    return {
        "step": 1e3 * last.diff().median().item(),
        "epoch": 1e3 * (last[-1] - last[0]).item(),
        "megabytes": peak_megabytes() - before,
    }


def in_a_process(name: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.training_loops", "--measure", name]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--measure", choices=list(LOOPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    rounds: dict[str, list[dict]] = {name: [] for name in arguments.loops}
    for _ in tqdm(range(arguments.rounds), desc="rounds"):
        for name in arguments.loops:
            rounds[name].append(in_a_process(name))
    best = {name: {key: min(r[key] for r in of) for key in of[0]} for name, of in rounds.items()}
    print(cpu_name())
    print(f"{'':32}{'step, ms':>10}{'epoch, ms':>11}{'memory, MB':>12}{'ours':>8}")
    ours = best["ours"]["epoch"] if "ours" in best else float("nan")
    for name, row in best.items():
        ratio = f"{row['epoch'] / ours:.2f}x"
        print(f"{name:32}{row['step']:10.1f}{row['epoch']:11.0f}{row['megabytes']:12.0f}{ratio:>8}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu": cpu_name(), "loops": best}, indent=2))


if __name__ == "__main__":
    main()
