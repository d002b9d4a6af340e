"""Times whole sampling runs of a ContextUnet and writes <device>/sampling.json and sampling.md.

gpu_check.py runs it. Two passes over the runs: everything but torch.compile, then the source's
loops with their network under torch.compile(mode="reduce-overhead"), as the time allows.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import diffusion_ext as dx

from .. import source
from ..device import clock
from ..eager import SCHEDULE
from ..networks import Networks
from ..work import DTYPES
from .passes import Passes, main
from .sampling_report import COMPILED, SOURCE, WAYS, SamplingReport
from .stand_in import STAND_IN

# Of the largest value, after the first two steps. On a GPU convolutions round float32 to TF32.
TOLERANCES = {"float32": 1e-2, "bfloat16": 1e-1}
REPETITIONS, LONG = 3, 1.0  # a run of more seconds is not repeated


@dataclass(frozen=True)
class Run:
    """networks.steps steps of DDIM, or DDPM on a schedule of so many; every call is given
    (x_T, context, seeds) and returns the images."""

    networks: Networks
    dtype: str
    sampler: str

    @property
    def row(self) -> dict:
        sizes = {name: getattr(self.networks, name) for name in ("n_feat", "height", "batch")}
        row = {"sampler": f"{self.sampler}, {self.networks.steps} steps", "dtype": self.dtype}
        return {**row, **sizes, "compile": "not tried", "error": {}, "seconds": {}}

    @property
    def name(self) -> str:
        row = self.row
        return ", ".join(str(row[name]) for name in ("sampler", "n_feat", "height", "dtype"))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.networks.case.draw(), self.networks.context(), self.networks.case.seeds()

    def by_source(self, network: Callable, dtype: torch.dtype, seeded: bool = False) -> Callable:
        """The source's loop. seeded: with the noise that our samplers make of the seeds."""
        steps = self.networks.steps

        def ddim(x, c, seeds):
            return source.ddim(network, x.to(dtype), c.to(dtype), self.networks.tables(), steps)

        def ddpm(x, c, seeds):
            timesteps = iter(range(steps, 1, -1))

            def draw(x):
                return dx.philox_normal(seeds, x.shape, next(timesteps), stream=1, dtype=x.dtype)

            tables, noise = self.networks.tables(steps), {"draw": draw} if seeded else {}
            return source.ddpm(network, x.to(dtype), c.to(dtype), tables, **noise)

        return ddim if self.sampler == "DDIM" else ddpm

    def by_us(self, network: Callable, engine: str) -> Callable:
        steps = self.networks.steps
        if self.sampler == "DDIM":
            table = dx.ddim(SCHEDULE, steps)
        else:
            table = dx.ddpm(dx.NoiseSchedule.linear(steps))

        def call(x, c, seeds):
            options = {"seeds": seeds, "x_T": x, "engine": engine, "progress": False}
            return dx.sample(network, x.shape, table, c, **options).images

        return call

    def short(self) -> Run:
        return dataclasses.replace(self, networks=dataclasses.replace(self.networks, steps=2))


class Bench(Passes):
    report_of, failure, seconds = SamplingReport, "failed", 60
    _compiled = (None, None)

    def __init__(self, arguments):
        super().__init__(arguments)
        self.known = {}  # what the last run is checked with
        self.last_ways = {}  # of the last network

    def works(self) -> list[Run]:
        return all_runs()

    def kind(self, run: Run, part: str) -> str:
        """An engine that crashes does so for every network."""
        return f"{run.dtype}, {part}"

    def parts(self, run: Run) -> tuple[str, ...]:
        return WAYS

    def compiled_parts(self, run: Run) -> tuple[str, ...]:
        return (COMPILED,)

    def row(self, run: Run) -> dict:
        return run.row

    def ways(self, run: Run) -> dict[str, Callable[[Run], Callable]]:
        """name -> what makes its call of a run."""
        key = (dataclasses.replace(run.networks, steps=0), run.dtype)
        if key not in self.last_ways:
            self.last_ways = {key: self.ways_of(run)}
        return self.last_ways[key]

    def ways_of(self, run: Run) -> dict[str, Callable[[Run], Callable]]:
        dtype, networks = DTYPES[run.dtype], run.networks
        theirs, plain = networks.source_model(dtype), networks.our_model().to(dtype)
        fast = dx.optimize_for_sampling(networks.our_model(), networks.batch, dtype)
        made = [lambda run: run.by_source(theirs, dtype)]
        for network in (plain, fast):
            made += [partial(Run.by_us, network=network, engine=e) for e in ("eager", "graph")]
        return dict(zip(WAYS, made, strict=True))

    def check(self, run: Run, row: dict, name: str, call: Callable) -> None:
        """call, of run.short(), gives what the source's loop does in float32."""
        inputs, wanted = self.wanted(run)
        worst = (call(*inputs).float() - wanted).abs().max() / wanted.abs().max()
        row["error"][name] = worst = worst.item()
        if not worst <= TOLERANCES[run.dtype]:
            raise AssertionError(f"{name}: off by {worst:.3g} of the largest value")

    def wanted(self, run: Run) -> tuple[tuple, Tensor]:
        """(inputs, what the source's loop makes of them in float32)"""
        if run not in self.known:
            inputs, exact = run.inputs(), run.networks.source_model()
            result = run.by_source(exact, torch.float32, seeded=True)(*inputs)
            self.known = {run: (inputs, result)}
        return self.known[run]

    def measure(self, run: Run, row: dict, name: str) -> None:
        way = self.ways(run)[name]
        if name != SOURCE:  # whose noise is its own
            self.check(run.short(), row, name, way(run.short()))
        row["seconds"][name] = seconds_of(way(run), run.inputs())

    def compile(self, run: Run, row: dict, _) -> None:
        dtype, short, network = DTYPES[run.dtype], run.short(), self.compiled(run)
        self.check(short, row, COMPILED, short.by_source(network, dtype, seeded=True))
        row["seconds"][COMPILED] = seconds_of(run.by_source(network, dtype), run.inputs())

    def compiled(self, run: Run) -> Callable:
        """The source's network, which the two samplers have one after the other."""
        key = (dataclasses.replace(run.networks, steps=0), run.dtype)
        if key != self._compiled[0]:
            torch._dynamo.reset()
            network = run.networks.source_model(DTYPES[run.dtype])
            options = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
            self._compiled = key, torch.compile(network, **options)
        return self._compiled[1]

    @staticmethod
    def said_of(row: dict) -> str:
        return ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in row["seconds"].items())


def seconds_of(call: Callable, inputs: tuple) -> float:
    """The least of a few runs; the first makes what later ones find, such as a graph."""
    call(*inputs)
    best = float("inf")
    for _ in range(REPETITIONS):
        start = clock()
        call(*inputs)
        best = min(best, clock() - start)
        if best > LONG:
            break
    return best


def all_runs() -> list[Run]:
    """The two samplers of a network one after the other; on the stand-in a small one.

    The course's network and the default one, in so few steps that all runs fit beside each other.
    """
    sizes, steps = [(64, 16), (256, 28)], {"DDIM": 20, "DDPM": 100}
    if STAND_IN:
        sizes, steps = [(8, 8)], {"DDIM": 2, "DDPM": 3}
    batch = 2 if STAND_IN else 32
    return [
        Run(Networks("cuda", n_feat, height, batch, n), dtype, sampler)
        for n_feat, height in sizes
        for dtype in TOLERANCES
        for sampler, n in steps.items()
    ]


if __name__ == "__main__":
    sys.exit(main(__spec__.name, Bench, __doc__))
