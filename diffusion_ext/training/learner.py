"""A network with what changes its weights: forward, loss, backward, optimizer, average."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..samplers.schedules import NoiseSchedule
from .config import TrainingConfig
from .data import Batch
from .draws import BatchDraws
from .ema import ExponentialMovingAverage
from .gradient_sum import GradientSum
from .objective import Objective
from .optimizers import build_optimizer, optimizer_state, restore_optimizer
from .processes import Processes
from .sharding import Shards, laid_as, local

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """The network of a run, trained batch by batch.

    Args: processes: of the run; several want the shapes of an image and of its context.
    Attributes:
        model: on the device, in channels_last. average: its moving average.
        optimizer, scaler: the latter of float16.
        sum: of the gradients over several processes, which have the network whole; else None.
        sharded: whether each process has a part of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        schedule: NoiseSchedule,
        device: torch.device,
        processes: Processes | None = None,
        shape: tuple[int, ...] = (),
        context_shape: tuple[int, ...] | None = None,
    ):
        self.config, self.device, self.timesteps = config, device, schedule.timesteps
        self._shapes = shape, context_shape
        self._autocast = DTYPES.get(config.precision)
        self.model = model = model.to(device, memory_format=torch.channels_last)
        self.processes = processes or Processes()
        several = self.processes.count > 1
        if several and device.type == "cuda":  # torch has whole batches' statistics for GPUs alone
            self.model = model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.sharded = several and config.shard
        self.sum = None
        if several and not self.sharded:
            # In evaluation, which leaves running statistics alone; all start as the first one.
            self.sum = GradientSum(model, device, self._of_nothing(model.eval()))
        self._network = model if self.sum is None else self.sum.network
        if self.sharded:
            shards = Shards(model, lambda: self._of_nothing(model.eval()), device, self.processes)
        self.average = ExponentialMovingAverage(model, config.ema_decay, config.ema_std)
        if self.sharded:
            shards.cut(model)
            shards.cut(self.average.model)
        self.optimizer = build_optimizer(model, config)
        self.objective = Objective(config, schedule, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self._keep_buffers()
        if config.compile:
            self._network = torch.compile(self._network)

    def adding_up(self, last: bool):
        """The context of a batch's `backward` or `stand_in`; after the last batch of a step the
        gradients of several processes are summed."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        return nullcontext() if self.sum is None else self.sum.adding_up(last)

    def backward(self, batch: Batch, draws: BatchDraws, of: int) -> tuple[Tensor, Tensor]:
        """Adds a batch's gradients to those that the next `update` will use, as part of `of`
        images. Returns the losses [B], as they are trained (weighted) and as they are."""
        x0, context, t = batch.images, batch.context, draws.t
        if self.config.flip:
            x0 = torch.where(draws.flip.reshape(-1, 1, 1, 1), x0.flip(3), x0)
        if context is not None:
            context = context * draws.keep.reshape(-1, *[1] * (context.dim() - 1))
        x_t = self.objective.noised(x0, t, draws.seeds)
        output = self._predict(self._network, x_t, t, context)
        upstream = self.scaler.scale(torch.full((len(x0),), 1 / of, device=self.device))
        losses, gradient = self.objective.losses_and_gradient(output, x0, t, draws.seeds, upstream)
        output.backward(gradient)
        return self.objective.weighted(losses, t), losses

    def stand_in(self) -> None:
        """In place of `backward` where this process has no image of a batch: it takes part in the
        sum of the gradients with zeros."""
        if self.processes.count > 1:
            output = self._of_nothing(self._network)
            output.backward(torch.zeros_like(output))

    def stand_in_averaged(self) -> None:
        """In place of `predict_averaged`, where this process has no image of a batch."""
        if self.sharded:
            self._of_nothing(self.average.model)

    def _of_nothing(self, network) -> Tensor:
        """What a network makes of an image of zeros: [1, C, S, S]."""
        shape, context_shape = self._shapes
        x = torch.zeros(1, *shape, device=self.device).to(memory_format=torch.channels_last)
        context = None if context_shape is None else x.new_zeros(1, *context_shape)
        return self._predict(network, x, x.new_ones(1), context)

    def update(
        self, step: int, learning_rate: float, want_norm: bool
    ) -> tuple[Tensor | None, bool]:
        """The optimizer's step, the run's `step`-th, counted from 1.

        Returns: the norm of the gradient before it was shortened, [] on the device, where it is
        wanted or was needed; and whether the weights changed: with skip_bad_steps only for a finite
        gradient. A bad loss of any process is in the sum that all of them have.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self.config.clip_gradient is not None or want_norm or self.config.skip_bad_steps:
            self.scaler.unscale_(self.optimizer)
            limit = math.inf if self.config.clip_gradient is None else self.config.clip_gradient
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            norm = norm.full_tensor() if self.sharded else norm
        good = not self.config.skip_bad_steps or math.isfinite(norm)  # which waits for the device
        if good or self.scaler.is_enabled():  # a scaler steps where it can, and learns from this
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        if good:
            self.average.update(self.model, step)
            self._keep_buffers()
        else:
            for buffer, kept in zip(self.model.buffers(), self._buffers, strict=True):
                buffer.copy_(kept)
        return norm, good

    def _keep_buffers(self) -> None:
        """As they are before a step: what is not finite would stay in running statistics."""
        if self.config.skip_bad_steps:
            self._buffers = [buffer.clone() for buffer in self.model.buffers()]

    def is_finite(self) -> bool:
        """Whether every weight of this process is; it is read off the device."""
        parts = [local(p.detach()) for p in self.model.parameters()]
        largest = torch._foreach_norm([part for part in parts if part.numel()], math.inf)
        return bool(np.isfinite(torch.stack(largest).float().cpu().numpy()).all())

    def predict_averaged(self, x_t: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """What the average makes of x_t; t: int64 [B]."""
        return self._predict(self.average.model, x_t, t, context)

    def _predict(self, network, x_t: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            output = network(x_t, t / self.timesteps, context)
        if output.shape != x_t.shape:
            raise ValueError(
                f"model: wanted an output of x's shape {list(x_t.shape)}, got {list(output.shape)}"
            )
        return output

    def state(self) -> dict:
        """Its part of a Checkpoint."""
        tensors, numbers = optimizer_state(self.optimizer, self.model)
        return {
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "optimizer": tensors,
            "optimizer_numbers": numbers,
            "scaler": self.scaler.state_dict(),
        }

    def likeness(self) -> Callable[[str, str], Tensor | None]:
        """(group, name) -> a tensor of the shape and cut of that one in `state`; None where it is
        not one of the network's or a moment's."""
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.average.model.state_dict(),
            "optimizer": dict(self.model.named_parameters()),
        }

        def like(group: str, name: str) -> Tensor | None:
            key = name.rpartition(".")[0] if group == "optimizer" else name
            return tensors.get(group, {}).get(key)

        return like

    def restore(self, checkpoint) -> None:
        """Takes up what `state` told."""
        for network, state in (
            (self.model, checkpoint.model),
            (self.average.model, checkpoint.ema),
        ):
            if self.sharded:
                laid = network.state_dict()
                state = {name: laid_as(value, laid[name]) for name, value in state.items()}
            network.load_state_dict(state)
        self._keep_buffers()
        restore_optimizer(
            self.optimizer, self.model, checkpoint.optimizer, checkpoint.optimizer_numbers
        )
        if checkpoint.scaler:
            self.scaler.load_state_dict(checkpoint.scaler)
