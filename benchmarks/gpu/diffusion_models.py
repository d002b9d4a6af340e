"""Times networks of Stable Diffusion's shape and writes networks.json and networks.md.

gpu_check.py runs it. A guided step of a UNet2DConditionModel with its scheduler, and the decoding
of an image by an AutoencoderKL, in bfloat16 with random weights: eager in both memory formats,
after dx.fuse, and compiled without and with it. Wants diffusers.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import diffusion_ext as dx

from .passes import Passes, main
from .report import Report, table
from .sampling import seconds_of
from .stand_in import STAND_IN

STEPS, GUIDANCE = 5, 7.5
PLAIN, EAGER, FUSED = "eager, contiguous", "eager", "fused"
COMPILED, BOTH = "compiled", "fused, compiled"
WAYS = (EAGER, PLAIN, FUSED, COMPILED, BOTH)
SD = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
SMALL = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "cross_attention_dim": 16, "attention_head_dim": 4, "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
SMALL_VAE = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
LEGEND = f"""\
Milliseconds of a guided denoising step (batch 1, so 2 for the network, {STEPS} steps of DDIM, the
scheduler's step included) and of decoding one image; the least of three runs. In channels_last,
other than "{PLAIN}", which may be the faster: on a GPU torch's GroupNorm makes its input
contiguous. "{FUSED}" after `dx.fuse`, with our scheduler. Before it was timed each was compared
with the network in float32: it may be no further from it than twice what eager bfloat16 is.
"""


@dataclass(frozen=True)
class Denoising:
    """`STEPS` guided steps on latents [1, 4, size, size]."""

    device: str
    size: int
    config: tuple = tuple(SD.items())
    dtype: str = "bfloat16"
    calls = STEPS

    @property
    def name(self) -> str:
        return f"UNet2DConditionModel, {self.size}x{self.size} latents, a step"

    def model(self, dtype: torch.dtype):
        from diffusers import UNet2DConditionModel

        return made(self.device, dtype, UNet2DConditionModel, dict(self.config))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Latents, and the text of the two halves of a guided batch."""
        width = dict(self.config)["cross_attention_dim"]
        draw = torch.Generator("cpu").manual_seed(0)
        shapes = ((1, 4, self.size, self.size), (2, 77, width))
        return tuple(torch.randn(s, generator=draw).to(self.device) for s in shapes)

    def once(self, model: Callable, x: Tensor, text: Tensor, t: Tensor | int = 1) -> Tensor:
        """The network's part of a step."""
        return model(torch.cat([x, x]), t, text).sample

    def compiled(self, model):
        """The module whose forward is compiled."""
        return model

    def run(self, model: Callable, ours: bool) -> Callable:
        from diffusers import DDIMScheduler

        from diffusion_ext.integrations.diffusers import DDIMScheduler as Ours

        steps = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = (Ours if ours else DDIMScheduler)(**steps, clip_sample=False)

        @torch.no_grad()
        def loop(x, text):
            scheduler.set_timesteps(STEPS, device=x.device)
            for t in scheduler.timesteps:
                without, with_text = self.once(model, x, text, t).chunk(2)
                guided = without + GUIDANCE * (with_text - without)
                x = scheduler.step(guided, t, x).prev_sample
            return x

        return loop


@dataclass(frozen=True)
class Decoding:
    """Latents [1, 4, size/8, size/8] to an image."""

    device: str
    size: int
    config: tuple = tuple(VAE.items())
    dtype: str = "bfloat16"
    calls = 1

    @property
    def name(self) -> str:
        return f"AutoencoderKL, decoding {self.size}x{self.size}"

    def model(self, dtype: torch.dtype):
        from diffusers import AutoencoderKL

        levels = len(dict(self.config)["block_out_channels"])
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        config = {"latent_channels": 4, **blocks, **dict(self.config)}
        return made(self.device, dtype, AutoencoderKL, config)

    def inputs(self) -> tuple[Tensor]:
        smaller = 2 ** (len(dict(self.config)["block_out_channels"]) - 1)
        latents = (1, 4, self.size // smaller, self.size // smaller)
        draw = torch.Generator("cpu").manual_seed(0)
        return (torch.randn(latents, generator=draw).to(self.device),)

    def once(self, model: Callable, z: Tensor) -> Tensor:
        return model.decode(z).sample

    def compiled(self, model):
        """model.decode calls its decoder, and no forward of its own."""
        return model.decoder

    def run(self, model: Callable, ours: bool) -> Callable:
        return torch.no_grad()(lambda z: self.once(model, z))


def made(device: str, dtype: torch.dtype, kind: type, config: dict):
    """The same weights for the same dtype, drawn where they stay."""
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**config).eval()
    return model.to(dtype=dtype, memory_format=torch.channels_last)


class NetworksReport(Report):
    name, title, legend = "networks", "Networks of Stable Diffusion's shape", LEGEND

    def summary(self) -> list[dict]:
        return []  # docs/kernels.md has predictions, no targets

    def lines(self) -> list[str]:
        return [
            f"{row['work']}: {way} {gain:.2f} times as fast as {other}"
            for row in self.rows
            for way, other, gain in gains(row["ms"])
        ]

    def sections(self) -> list[str]:
        lines = [
            [
                row["work"],
                *(f"{row['ms'][w]:.2f}" if w in row["ms"] else "" for w in WAYS),
                row.get("error", ""),
            ]
            for row in self.rows
        ]
        return ["## ms\n\n" + table(["network", *WAYS, "failed"], lines)]


def gains(ms: dict[str, float]) -> list[tuple[str, str, float]]:
    """(ours, what it stands against, how many times as fast): eagerly, the faster of the two."""
    eager = min((way for way in (PLAIN, EAGER) if way in ms), key=ms.get, default=EAGER)
    pairs = ((FUSED, eager), (BOTH, COMPILED))
    return [(way, other, ms[other] / ms[way]) for way, other in pairs if {way, other} <= set(ms)]


class Bench(Passes):
    report_of, seconds, compiled_in_small = NetworksReport, 60, 2

    def __init__(self, arguments):
        super().__init__(arguments)
        self.known = {}  # the last work's result in float32

    def kind(self, work, part: str) -> str:
        return part

    def parts(self, work) -> tuple[str, ...]:
        return WAYS[:3]

    def compiled_parts(self, work) -> tuple[str, ...]:
        return WAYS[3:]

    def works(self) -> list:
        if importlib.util.find_spec("diffusers") is None:
            print("diffusers is not installed: no row (make gpu-wheels)")
            return []
        if STAND_IN:
            return [
                Denoising("cuda", 8, tuple(SMALL.items())),
                Decoding("cuda", 8, tuple(SMALL_VAE.items())),
            ]
        return [Denoising("cuda", 64), Decoding("cuda", 512), Decoding("cuda", 1024)]

    def rank(self, work) -> int:
        """A UNet takes a minute to compile, in which decoders do it twice."""
        return isinstance(work, Denoising)

    def row(self, work) -> dict:
        return {
            "work": work.name,
            "dtype": work.dtype,
            "ms": {},
            "off": {},
            "compile": "not tried",
        }

    def call(self, work, way: str) -> Callable:
        model = work.model(torch.bfloat16)
        if way == PLAIN:
            model.to(memory_format=torch.contiguous_format)
        ours = way in (FUSED, BOTH)
        if ours:
            dx.fuse(model)
        if way in (COMPILED, BOTH):
            torch._dynamo.reset()  # what it knows of other sizes would make this one dynamic
            work.compiled(model).compile(dynamic=False)
        run = work.run(model, ours)
        return lambda *inputs: run(*(t.bfloat16() for t in inputs))

    def take(self, work, row: dict, way: str, call: Callable) -> None:
        """Checks a way's result, then times it. EAGER, which sets the limit, is the first."""
        inputs = work.inputs()
        exact = self.exact(work, inputs)
        off = (call(*inputs).float() - exact).norm() / exact.norm()
        row["off"][way] = off = off.item()
        most = 2 * row["off"][EAGER] + 1e-3
        if not off <= most:
            raise AssertionError(f"{way}: off by {off:.3g} of the norm, eager by {most / 2:.3g}")
        row["ms"][way] = 1e3 * seconds_of(call, inputs) / work.calls

    def exact(self, work, inputs) -> Tensor:
        """The network's own result in float32."""
        if work not in self.known:
            self.known = {work: work.run(work.model(torch.float32), False)(*inputs)}
        return self.known[work]

    def measure(self, work, row: dict, way: str) -> None:
        self.take(work, row, way, self.call(work, way))

    def compile(self, work, row: dict, way: str) -> None:
        compiled = counters["stats"]
        call = self.call(work, way)
        compiled.clear()
        call(*work.inputs())
        if not compiled["unique_graphs"]:
            raise AssertionError(f"{way}: torch.compile was not reached")
        self.take(work, row, way, call)

    @staticmethod
    def said_of(row: dict) -> str:
        return ", ".join(f"{way} {ms:.2f} ms" for way, ms in row["ms"].items())


if __name__ == "__main__":
    sys.exit(main(__spec__.name, Bench, __doc__))
