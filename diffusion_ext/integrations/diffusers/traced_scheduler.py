"""TracedScheduler: a diffusers scheduler whose steps are traced once, and then one kernel each."""

from __future__ import annotations

import functools
import inspect
import operator
import types

import torch
from torch import Tensor

from ...ops import philox_normal
from ...ops.sampler_step import step_of_row
from .fused_scheduler import FusedScheduler, alike
from .runs import on_the_host, put_on
from .step_trace import StepTrace
from .traced_run import TracedRun
from .tracing import StepCall, Untraceable, trace_step

__all__ = ["TracedScheduler"]

NEW = object()  # what a key has that no step was traced for


class TracedScheduler(FusedScheduler):
    """Mixed in before a diffusers scheduler.

    Its state stays where diffusers has it, in the same attributes: diffusers' own step can take
    over at any time, and copies and pickles in the middle of a run go on. A subclass says:

    Attributes:
        counts: the attributes that a step changes and that are numbers, or None.
        keeps: those that are tensors, or lists with them.
        notes: lists that a step changes and no step reads.
        reads_timestep: the weights of a step depend on the timestep that it is given, and not only
            on its place in the run.
        on_device: the tensors that set_timesteps moves to the device.
    """

    counts: tuple[str, ...] = ("_step_index",)
    keeps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reads_timestep = False
    on_device: tuple[str, ...] = ("timesteps",)
    _latest: TracedRun | None = None  # of any of its kind, whose traces a new one may have
    own = ("noise", "exact_coefficients", "_run", "_seeds")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in self.state:  # some of them come with the first step
            self.__dict__.setdefault(name, None)

    @classmethod
    def prepare(cls) -> None:
        def names(method, skipped):
            return tuple(inspect.signature(method).parameters)[skipped:]

        cls.state = (*cls.counts, *cls.keeps, *cls.notes)
        cls._step_arguments = names(cls.theirs.step, 4)  # after the sample
        cls._draws = "generator" in cls._step_arguments
        cls._timesteps_arguments = names(cls.theirs.set_timesteps, 1)

        counted = operator.itemgetter(*cls.counts) if cls.counts else lambda attributes: ()
        cls._counted = staticmethod(counted)
        cls.step = as_declared(TracedScheduler.step, cls.theirs.step)
        cls.set_timesteps = as_declared(TracedScheduler.set_timesteps, cls.theirs.set_timesteps)

    # --- a run ------------------------------------------------------------------------------------

    def set_timesteps(self, *args, **kwargs) -> None:
        """On the host, from where the tensors go to the device: what a step needs is known here."""
        if len(args) > len(self._timesteps_arguments):
            self.theirs.set_timesteps(self, *args, **kwargs)  # which refuses them
        if "noise" not in self.__dict__:  # some constructors of diffusers call it
            return self.theirs.set_timesteps(self, *args, **kwargs)
        given = dict(zip(self._timesteps_arguments, args, strict=False)) | kwargs
        device = given.pop("device", None)
        self.theirs.set_timesteps(self, device="cpu", **given)
        if self.exact_coefficients:
            self._exact_levels()
        cls = type(self)
        self._run = cls._latest = TracedRun(self, self._run or cls._latest)
        for name in self.on_device:
            setattr(self, name, getattr(self, name).to(device))
        self._run.hold(self)
        self._forget()

    def _exact_levels(self) -> None:
        """What diffusers' set_timesteps has computed of σ in float32, anew in float64."""

    def _forget(self) -> None:
        """What diffusers leaves of the run before, and no step of this one reads: tensors of
        another shape are not a row's to take, and the first step would have other bits."""
        for name in self.keeps:
            if isinstance(getattr(self, name), Tensor):
                setattr(self, name, None)

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
            if value is not None and value not in run.indices:
                timesteps = run.host.timesteps
                with on_the_host():
                    index = super().index_for_timestep(timesteps.new_tensor(value), timesteps)
                run.indices[value] = index
            if value is not None:
                return run.indices[value]
        return super().index_for_timestep(timestep, schedule_timesteps)

    # --- a step -----------------------------------------------------------------------------------

    def step(self, model_output, timestep, sample, *args, **options):
        if args:
            if len(args) > len(self._step_arguments):
                self.theirs.step(self, model_output, timestep, sample, *args, **options)  # refuses
            options = dict(zip(self._step_arguments, args, strict=False)) | options
        generator = options.pop("generator", None) if self._draws else None
        kept: list[Tensor] = []
        trace = self._trace(model_output, timestep, sample, options, kept)
        if trace is None:
            if generator is not None:
                options["generator"] = generator
            return self.theirs.step(self, model_output, timestep, sample, **options)
        noise, seeds = None, None
        if trace.noise is not None:
            noise, seeds = self._noise(trace, model_output, sample, generator, options)
        if trace.plain and (noise is None or noise.dtype == sample.dtype):
            slots = [kept[j] for j in trace.slots]
            results = trace.run(sample, model_output, noise, seeds, slots)
        else:
            results, noise = self._mixed(trace, model_output, sample, kept, noise, seeds)
        elements = (sample, model_output, noise, *results, *kept)
        trace.keep(elements, timestep, self.__dict__)
        return trace.returned(elements)

    def _trace(self, model_output, timestep, sample, options, kept: list) -> StepTrace | None:
        """How the step goes, and in `kept` the tensors of the state; None: as diffusers has it."""
        attributes = self.__dict__
        if not alike(model_output, sample) or torch.compiler.is_compiling():
            return None
        if attributes.get("num_inference_steps") is None:
            return None
        run = attributes["_run"]
        if run is None or not run.holds(attributes):
            run = self._current_run()
        if attributes.get("_step_index", 0) is None:
            if not isinstance(timestep, Tensor):
                return None
            self._init_step_index(timestep)
        key = (
            run.moment(timestep) if self.reads_timestep else _kind(timestep),
            _kept(run, attributes, self.keeps, sample, kept) if self.keeps else (),
            sample.dtype,
            model_output.dtype,
            self._counted(attributes),
            *options.items(),
        )
        if "variance_noise" in options:
            key = _without_noise(key, sample)
        try:
            trace = run.traces.get(key, NEW)
        except TypeError:  # an option that is no key
            return None
        return self._new_trace(run, key, timestep, options, kept) if trace is NEW else trace

    def _new_trace(self, run, key, timestep, options, kept) -> StepTrace | None:
        if None in key[:2] or any(isinstance(value, Tensor) for _, value in key[5:]):
            return None
        attributes = self.__dict__
        place = attributes.get("_step_index", 0)
        state = {name: attributes[name] for name in (*self.counts, *self.keeps)}
        notes = {name: len(attributes[name]) for name in self.notes}
        dtypes = [*key[2:4], *(tensor.dtype for tensor in kept)]
        with on_the_host():
            if isinstance(timestep, Tensor):
                last = len(run.timesteps) - 1
                value = key[0][1] if self.reads_timestep else run.timesteps[min(place, last)]
                timestep = torch.tensor(value, dtype=timestep.dtype)
            call = StepCall(state, notes, timestep, options, dtypes)
            trace = self._traced(run, call)
        if trace is not None:
            trace.step = place + 1
        return run.keep(key, trace)

    def _traced(self, run: TracedRun, call: StepCall) -> StepTrace | None:
        try:
            return trace_step(run.host, call)
        except Untraceable:
            return None

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

    def _mixed(self, trace: StepTrace, model_output, sample, kept, noise, seeds):
        """(x', x0, what is written ...) of several dtypes, or thresholded; and the noise."""
        tensors = sample, model_output, *(kept[j] for j in trace.slots)
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        x, m, *slots = (tensor.to(dtype) for tensor in tensors)
        noise = None if noise is None else noise.to(dtype)
        if trace.threshold is None:
            return trace.run(x, m, noise, seeds, slots), noise
        # The threshold is a quantile of the whole x0: two passes, the second given x0 as a slot.
        row = put_on(trace.threshold, x.device)
        _, x0 = step_of_row(x, m, row, 0, None, None, [], None, True)
        x0 = self._threshold_sample(x0)
        following, *written = trace.run(x, m, noise, seeds, [*slots, x0])
        return (following, *([x0] if trace.returns_x0 else []), *written), noise


def as_declared(method: types.FunctionType, theirs) -> types.FunctionType:
    """The method with the name, documentation and signature of diffusers'."""
    own = types.FunctionType(method.__code__, method.__globals__, closure=method.__closure__)
    return functools.update_wrapper(own, theirs)


# --- the key of a trace: None where it has none ---------------------------------------------------


def _kind(timestep):
    return timestep.dtype if isinstance(timestep, Tensor) else (type(timestep), timestep)


def _without_noise(key: tuple, sample: Tensor) -> tuple:
    """variance_noise is an input of a step as the sample is."""

    def of(name, value):
        return (name, Tensor if name == "variance_noise" and alike(value, sample) else value)

    return *key[:5], *(of(name, value) for name, value in key[5:])


def _kept(run: TracedRun, attributes: dict, names: tuple, sample, kept: list) -> tuple | None:
    """The dtypes of the state's tensors [B, *], which go to `kept`, and what else is among them."""
    key: list = []
    for name in names:
        values = attributes[name]
        if type(values) is list:
            key.append(len(values))
        else:
            values = (values,)
        for value in values:
            if not isinstance(value, Tensor):
                key.append(value)
            elif value.dim():
                if value.shape != sample.shape or value.device != sample.device:
                    return None
                kept.append(value)
                key.append(value.dtype)
            elif value.is_cpu:
                key.append(run.number(value))
            else:
                return None
    return tuple(key)
