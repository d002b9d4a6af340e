"""The works of ContextUnet: its forward, a training step, whole sampling runs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import diffusion_ext as dx

from . import source
from .eager import SCHEDULE
from .peers import peers
from .work import Case, Implementation, Work, compile_anew, copy_of_x, referring

CONTEXT = 5
# Rounding grows through a network's layers, and by 1/signal over a sampler's steps.
FORWARD, TRAINING, SAMPLING = 16, 128, 256
TF32 = 64  # times more, in which cuDNN's convolutions round float32 by default


def tolerance(factor: float, device: str) -> float:
    return factor * (TF32 if device == "cuda" else 1)


@dataclass(frozen=True)
class Networks:
    """A ContextUnet with the same weights as the source has it and as we have it, and its inputs.

    Attributes:
        batch: of pictures [3, height, height]. steps: of DDIM, and of DDPM's whole schedule.
    """

    device: str = "cpu"
    n_feat: int = 64
    height: int = 16
    batch: int = 32
    steps: int = 20

    @property
    def case(self) -> Case:
        return Case((self.batch, 3, self.height, self.height), device=self.device)

    @property
    def configuration(self) -> dict[str, int]:
        sizes = {"n_feat": self.n_feat, "height": self.height}
        return {"in_channels": 3, "n_cfeat": CONTEXT, **sizes}

    def our_model(self) -> dx.nn.ContextUnet:
        """channels_last, as Trainer has it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = dx.nn.ContextUnet(**self.configuration).eval()
        return model.to(self.device, memory_format=torch.channels_last)

    def for_sampling(self):
        """The same, optimized for sampling."""
        return dx.optimize_for_sampling(self.our_model(), batch=self.batch)

    def source_model(self, dtype=torch.float32) -> source.ContextUnet:
        with torch.random.fork_rng():
            model = source.ContextUnet(**self.configuration).eval()
        model.load_state_dict(self.our_model().state_dict())
        return model.to(self.device, dtype)

    def tables(self, timesteps=source.TIMESTEPS, dtype=torch.float32) -> source.Tables:
        return source.Tables(timesteps, self.device, dtype)

    def context(self):
        return torch.eye(CONTEXT, device=self.device)[self.case.seeds() % CONTEXT]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in self.our_model().state_dict().values())


def built(make, **options) -> Implementation:
    """make() has networks of its own."""
    return Implementation(lambda *_: make(), **options)


@contextlib.contextmanager
def frozen():
    """torch.compile takes the weights as constants, lays them out anew and folds batch norms."""
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        yield


def twice_compiled(make, **options) -> dict[str, Implementation]:
    """As it is and with the weights frozen, for inference."""
    of = {"compiles": True, **options}
    return {
        "compiled": built(make, around=torch.no_grad, **of),
        "compiled, frozen": built(make, around=frozen, **of),
    }


# --- forward --------------------------------------------------------------------------------------


def forwards(networks: Networks) -> list[Work]:
    def inputs():
        t = torch.linspace(0.05, 1, networks.batch, device=networks.device)
        return networks.case.draw(), t, networks.context()

    of = {"around": torch.no_grad, "factor": tolerance(FORWARD, networks.device)}
    ours = built(networks.our_model, **of)
    rows = {"copy": copy_of_x(), "eager": built(networks.source_model, **of)}
    rows |= twice_compiled(lambda: compile_anew(networks.source_model()), factor=of["factor"])
    rows |= peers(networks.source_model, networks.device, factor=of["factor"])
    rows |= {"reference": referring(ours), "ours": ours}
    rows["ours, optimized"] = built(networks.for_sampling, **of)
    work = Work(
        op="ContextUnet",
        variant="forward",
        case=networks.case,
        inputs=inputs,
        implementations=rows,
        exact=lambda *inputs: networks.source_model(torch.float64)(*inputs),
        passes=2,
        weights=networks.bytes,
    )
    return [work]


# --- training -------------------------------------------------------------------------------------


def result(model, loss) -> tuple:
    """The loss and every gradient, which the check looks at."""
    return loss, *(p.grad for _, p in sorted(model.named_parameters()))


def source_training(networks: Networks, dtype=torch.float32, loss_of=source.loss_of):
    model, ab = networks.source_model(dtype).train(), networks.tables(dtype=dtype).alpha_bar
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x0, t, c, _, draw=torch.randn_like):
        loss = source.training_step(model, optimizer, x0, t, c, ab, draw, loss_of)
        return result(model, loss)

    return step


def our_training(networks: Networks, prepare=lambda model: model):
    """Trainer's step, without what the source's has not: the moving average of the weights."""
    model = networks.our_model().train()
    predict = prepare(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step(x0, t, c, seeds):
        x_t, noise = dx.perturb(x0, t, SCHEDULE, seeds=seeds)
        loss = F.mse_loss(predict(x_t, t / SCHEDULE.timesteps, c), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return result(model, loss.detach())

    return step


def training_inputs(networks: Networks) -> tuple:
    """x0, t, context, seeds"""
    t = 1 + 15 * networks.case.seeds() % SCHEDULE.timesteps
    return networks.case.draw(), t, networks.context(), networks.case.seeds()


def trainings(networks: Networks) -> list[Work]:
    def exact(x0, t, c, seeds, draw=None):
        made = draw or (lambda x0: dx.perturb(x0, t, SCHEDULE, seeds=seeds)[1])
        return source_training(networks, torch.float64)(x0, t, c, seeds, made)

    def compiled():
        return source_training(networks, loss_of=compile_anew(source.loss_of))

    of = {"factor": tolerance(TRAINING, networks.device)}
    ours = built(partial(our_training, networks), noise="seeds", **of)
    rows = {"copy": copy_of_x(), "eager": built(partial(source_training, networks), **of)}
    rows |= {"compiled": built(compiled, compiles=True, **of)}
    rows |= {"reference": referring(ours), "ours": ours}
    ours_compiled = partial(our_training, networks, compile_anew)
    rows["ours, compile"] = built(ours_compiled, compiles=True, noise="seeds", **of)
    work = Work(
        op="ContextUnet",
        variant="training step",
        case=networks.case,
        inputs=partial(training_inputs, networks),
        implementations=rows,
        exact=exact,
        passes=2,
        weights=7 * networks.bytes,  # the weights, their gradients, Adam's two moments
        random=True,
        backward=True,
    )
    return [work]


# --- sampling -------------------------------------------------------------------------------------


def our_sampling(networks: Networks, table) -> dict[str, Implementation]:
    """By every engine, of the network as it is and optimized for sampling."""
    builders = {"ours": networks.our_model, "ours, optimized": networks.for_sampling}
    rows = {}
    for name, build in builders.items():
        for engine in ("eager", "compile", "graph", "auto"):
            rows[name if engine == "eager" else f"{name}, {engine}"] = built(
                partial(sampler, build, table, engine),
                noise="seeds",
                factor=tolerance(SAMPLING, networks.device),
                compiles=engine in ("compile", "auto"),
                missing="CUDA graphs" if (engine, networks.device) == ("graph", "cpu") else "",
            )
    return rows


def sampler(build, table, engine="eager"):
    model = build()

    def sample(x_T, c, seeds):
        options = {"seeds": seeds, "x_T": x_T, "engine": engine, "progress": False}
        return dx.sample(model, x_T.shape, table, c, **options).images

    return sample


def by_source_ddim(networks: Networks, dtype=torch.float32, step=source.ddim_step):
    model, tables = networks.source_model(dtype), networks.tables(dtype=dtype)
    return lambda x, c, _: source.ddim(model, x, c, tables, networks.steps, step)


def by_source_ddpm(networks: Networks, dtype=torch.float32):
    model, tables = networks.source_model(dtype), networks.tables(networks.steps, dtype)
    return lambda x, c, _, draw=torch.randn_like: source.ddpm(model, x, c, tables, draw)


def samplings(networks: Networks) -> list[Work]:
    steps = networks.steps
    common = {
        "op": "sample",
        "case": networks.case,
        "inputs": lambda: (networks.case.draw(), networks.context(), networks.case.seeds()),
        "passes": 2 * steps,
        "weights": steps * networks.bytes,
    }

    factor = tolerance(SAMPLING, networks.device)

    def rows(by_source):
        return {"copy": copy_of_x(), "eager": built(partial(by_source, networks), factor=factor)}

    def compiled_ddim():
        return by_source_ddim(networks, step=compile_anew(source.ddim_step))

    def exact_ddpm(x, c, seeds, draw=None):
        timesteps = iter(range(steps, 1, -1))

        def seeded(x):
            return dx.philox_normal(seeds, x.shape, next(timesteps), stream=1, dtype=x.dtype)

        return by_source_ddpm(networks, torch.float64)(x, c, seeds, draw or seeded)

    ddim = Work(
        variant=f"DDIM, {steps} steps",
        implementations=rows(by_source_ddim)
        | twice_compiled(compiled_ddim, factor=factor)
        | our_sampling(networks, dx.ddim(SCHEDULE, steps)),
        exact=lambda *inputs: by_source_ddim(networks, torch.float64)(*inputs),
        **common,
    )
    ddpm = Work(
        variant=f"DDPM, {steps} steps",
        implementations=rows(by_source_ddpm)
        | our_sampling(networks, dx.ddpm(dx.NoiseSchedule.linear(steps))),
        exact=exact_ddpm,
        random=True,
        **common,
    )
    return [ddim, ddpm]
