"""TracedScheduler: a diffusers scheduler whose steps are traced once, and then one kernel each."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from ...ops import philox_normal
from ...ops.sampler_step import step_from_slots
from .fused_scheduler import FusedScheduler, alike
from .step_trace import NEXT, StepTrace, Untraceable, trace_step
from .traced_run import TracedRun

__all__ = ["ScalesInput", "TracedScheduler"]


class TracedScheduler(FusedScheduler):
    """Mixed in before a diffusers scheduler.

    Its state stays where diffusers has it, in the same attributes: diffusers' own step can take
    over at any time, and copies and pickles in the middle of a run go on. A subclass says:

    Attributes:
        state: the attributes that a step changes.
        reads_timestep: the weights of a step depend on the timestep that it is given, and not only
            on its place in the run.
        on_device: the tensors that set_timesteps moves to the device.
    """

    state: tuple[str, ...] = ("_step_index",)
    reads_timestep = False
    on_device: tuple[str, ...] = ("timesteps",)
    own = ("noise", "exact_coefficients", "_run", "_seeds", "_last", "_scales_ahead")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # (x', its version, the next scale_model_input of it or None) of the step before
        self._last = (None, None, None)
        self._scales_ahead = False

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_last": (None, None, None)}

    @classmethod
    def prepare(cls) -> None:
        def names(method, skipped):
            return tuple(inspect.signature(method).parameters)[skipped:]

        cls._step_arguments = names(cls.theirs.step, 4)  # after the sample
        cls._timesteps_arguments = names(cls.theirs.set_timesteps, 1)

        @functools.wraps(cls.theirs.step)
        def step(self, model_output, timestep, sample, *args, **options):
            return self._step(model_output, timestep, sample, args, options)

        @functools.wraps(cls.theirs.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            self._set_timesteps(args, kwargs)

        cls.step, cls.set_timesteps = step, set_timesteps

    # --- a run ------------------------------------------------------------------------------------

    def _set_timesteps(self, args: tuple, kwargs: dict) -> None:
        """On the host, from where the tensors go to the device: what a step needs is known here."""
        if len(args) > len(self._timesteps_arguments):
            self.theirs.set_timesteps(self, *args, **kwargs)  # which refuses them
        if "noise" not in self.__dict__:  # some constructors of diffusers call it
            return self.theirs.set_timesteps(self, *args, **kwargs)
        given = dict(zip(self._timesteps_arguments, args, strict=False)) | kwargs
        device = given.pop("device", None)
        self.theirs.set_timesteps(self, device="cpu", **given)
        self._run = TracedRun(self, self._run)
        for name in self.on_device:
            setattr(self, name, getattr(self, name).to(device))
        self._run.hold(self)
        self._last = (None, None, None)

    def _current_run(self) -> TracedRun:
        if self._run is None or not self._run.holds(self.__dict__):
            self._run = TracedRun(self)
        return self._run

    def index_for_timestep(self, timestep, schedule_timesteps=None) -> int:
        """As diffusers', without a wait for the device where timestep is one of `timesteps`."""
        if isinstance(timestep, Tensor) and (
            schedule_timesteps is None or schedule_timesteps is self.timesteps
        ):
            run = self._current_run()
            value = run.value(timestep)
            if value is not None:
                timesteps = run.host.timesteps
                return super().index_for_timestep(timesteps.new_tensor(value), timesteps)
        return super().index_for_timestep(timestep, schedule_timesteps)

    # --- a step -----------------------------------------------------------------------------------

    def _step(self, model_output, timestep, sample, args: tuple, options: dict):
        if args:
            if len(args) > len(self._step_arguments):
                self.theirs.step(self, model_output, timestep, sample, *args, **options)  # refuses
            options = dict(zip(self._step_arguments, args, strict=False)) | options
        generator = options.pop("generator", None)
        kept: list[Tensor] = []
        trace = self._trace(model_output, timestep, sample, options, kept)
        if trace is None:
            if generator is not None:
                options["generator"] = generator
            return self.theirs.step(self, model_output, timestep, sample, **options)
        noise, seeds = None, None
        if trace.noise is not None:
            noise, seeds = self._noise(trace, model_output, sample, generator, options)
        elements = self._apply(trace, model_output, sample, kept, noise, seeds)
        trace.keep(elements, self.__dict__)
        if trace.scaled is None:
            self._last = elements[NEXT], None, None
        else:
            self._last = elements[NEXT], _version(elements[NEXT]), trace.scaled.of(elements)
        return trace.returned(elements)

    def _trace(self, model_output, timestep, sample, options, kept: list) -> StepTrace | None:
        """How the step goes, and in `kept` the tensors of the state; None: as diffusers has it."""
        if not alike(model_output, sample) or sample.dim() == 0 or torch.compiler.is_compiling():
            return None
        run, attributes = self._current_run(), self.__dict__
        if attributes["num_inference_steps"] is None:
            return None
        if attributes.get("_step_index", 0) is None:
            if not isinstance(timestep, Tensor):
                return None
            self._init_step_index(timestep)
        key = (
            run.moment(timestep) if self.reads_timestep else _kind(timestep),
            _chosen(options, sample),
            _state(attributes, self.state, sample, kept),
            sample.dtype,
            model_output.dtype,
            self._scales_ahead,
        )
        if None in key:
            return None
        try:
            return run.traces[key]
        except KeyError:
            return self._new_trace(run, key, timestep, options, kept)
        except TypeError:  # an option that is no key
            return None

    def _new_trace(self, run, key, timestep, options, kept) -> StepTrace | None:
        attributes = self.__dict__
        place = attributes.get("_step_index", 0)
        if isinstance(timestep, Tensor):
            last = len(run.timesteps) - 1
            value = key[0][1] if self.reads_timestep else run.timesteps[min(place, last)]
            timestep = torch.tensor(value, dtype=timestep.dtype)
        state = {name: attributes.get(name) for name in self.state}
        dtypes = [*key[3:5], *(tensor.dtype for tensor in kept)]
        try:
            trace = trace_step(run.host, state, timestep, options, dtypes, self._scales_ahead)
            trace.step = place + 1
        except Untraceable:
            trace = None
        return run.keep(key, trace)

    def _noise(self, trace, model_output, sample, generator, options):
        """(z, None) or (None, seeds [B])."""
        given = options.get("variance_noise")
        if given is not None:
            return given, None
        noise, seeds = self._draw(model_output, generator, trace.noise)
        if seeds is not None and trace.keeps_noise:
            like = {"device": sample.device, "dtype": sample.dtype}
            return philox_normal(seeds, sample.shape, trace.step, stream=1, **like), None
        return noise, seeds

    def _apply(self, trace: StepTrace, model_output, sample, kept, noise, seeds) -> tuple:
        """What Sources point into."""
        x, m, slots = sample, model_output, [kept[j] for j in trace.slots]
        if not trace.single:
            dtype = torch.promote_types(x.dtype, m.dtype)
            x, m, *slots = (tensor.to(dtype) for tensor in (x, m, *slots))
            noise = None if noise is None else noise.to(dtype)
        tensors = (x, m, *trace.table(x), noise, seeds)
        if trace.threshold is None:
            options = trace.clip, 1.0, trace.returns_x0
            return (sample, model_output, noise, *step_from_slots(tensors, slots, options), *kept)
        # The threshold is a quantile of the whole x0: two passes, the second given x0 as a slot.
        before = (x, m, *trace.table(x, trace.threshold), None, None)
        x0 = self._threshold_sample(step_from_slots(before, [], (None, 1.0, True))[1])
        following, _, *written = step_from_slots(tensors, [*slots, x0], (None, 1.0, False))
        return (sample, model_output, noise, following, x0, *written, *kept)


class ScalesInput:
    """Mixed in before a TracedScheduler whose scale_model_input does something."""

    @classmethod
    def prepare(cls) -> None:
        super().prepare()

        @functools.wraps(cls.theirs.scale_model_input)
        def scale_model_input(self, sample, timestep):
            return self._scale(sample, timestep)

        cls.scale_model_input = scale_model_input

    def _scale(self, sample, timestep):
        """Of the sample that the step before made, with that step; which starts where a pipeline
        is seen to hand it on as it is."""
        last, version, scaled = self._last
        if sample is last:
            self._scales_ahead = True
            if scaled is not None and version is not None and version == _version(sample):
                return scaled
        return self.theirs.scale_model_input(self, sample, timestep)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


# --- the key of a trace: None where it has none ---------------------------------------------------


def _kind(timestep):
    return timestep.dtype if isinstance(timestep, Tensor) else (type(timestep), timestep)


def _chosen(options: dict, sample: Tensor) -> tuple | None:
    chosen = []
    for name, value in options.items():
        if isinstance(value, Tensor):
            if name != "variance_noise" or not alike(value, sample):
                return None
            value = Tensor
        chosen.append((name, value))
    return tuple(chosen)


def _state(attributes: dict, names: tuple, sample: Tensor, kept: list) -> tuple | None:
    """The numbers of the state, and the dtypes of its tensors [B, *], which go to `kept`."""
    key: list = []
    for name in names:
        values = attributes.get(name)
        if type(values) is list:
            key.append(len(values))
        else:
            values = (values,)
        for value in values:
            if not isinstance(value, Tensor):
                key.append(value)
            elif value.dim():
                if not alike(value, sample):
                    return None
                kept.append(value)
                key.append(value.dtype)
            elif value.is_cpu:
                key.append(value.item())
            else:
                return None
    return tuple(key)
