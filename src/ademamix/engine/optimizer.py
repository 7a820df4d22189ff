"""The torch.optim.Optimizer that users see: groups, state, checkpoints. The updates themselves are rules."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT

from ademamix import backends
from ademamix.backends import sent_to
from ademamix.engine.arguments import check_flags, check_seed, check_torch_s, show_options, with_floats
from ademamix.engine.clipping import Norm, Note, clipping, factor_and_skip, is_captured
from ademamix.engine.coefficients import Source
from ademamix.engine.interrupts import uninterrupted, without_gradients
from ademamix.engine.kinds import Kind, traced_once
from ademamix.engine.launches import GroupSettings, Inputs, Launches, Program, check_layout, check_tensors
from ademamix.engine.muon import Iteration, check_matrices
from ademamix.engine.offload import Host, Trip, with_master
from ademamix.engine.sharding import global_norm, gradients
from ademamix.engine.shared import Shared
from ademamix.engine.state import CPU, MASTER, are_low, check_state, counter, renewed, slot_formats, state_of
from ademamix.formats import SMALLEST, Format
from ademamix.geometries import NEWTON_SCHULZ

WHOLE = ("state", "backend", "skip_nonfinite", "offload", "flat_parameters")  # what no group has of its own


class RuleOptimizer(torch.optim.Optimizer, Kind):
    """An optimizer made of a rule: a subclass names the rule, its hyperparameters and the coefficients they give.

    Per-parameter state: ``step`` (0-dim tensor on the CPU, float32 as in torch.optim and float64 from 2**24 steps on;
    where steps are counted on a device, float64) and, for each slot of the rule that is stored, one
    tensor of the parameter's shape, and ``<slot>_scale`` (float32, [dim 0, ceil(rest / 256)]) where its format has
    scales; those of "int8" and "int16" are negative. Parameters that are float64 or complex, have one dimension or less
    than 4096 elements keep full precision. With ``flat_parameters`` those of one dimension and n elements are stored as
    [1, n] would be, but for DTensors.

    Args:
        params: parameters, (name, parameter) pairs, or dicts that define parameter groups.
        defaults: hyperparameters, each a param-group entry.
        maximize, state, backend, stochastic_rounding, seed, capturable, skip_nonfinite, offload, flat_parameters,
        fused, foreach, differentiable, amsgrad, geometry, adjust_lr_fn, ns_coefficients, ns_steps: what every optimizer
            takes; see :class:`AdEMAMix`. A subclass takes them as ``**options: Unpack[Options]``, which its signature
            shows one by one, and hands them on. ``state`` may map slots to formats by their names in
            ``ademamix.formats.FORMATS``; slots not in it are float32, "compact" is the class's ``compact``. A subclass
            that has a ``memory`` has all geometries; one with nothing but a ``rule`` has "adam".

    Raises:
        ValueError: an argument is out of its range; the message names its value and what is allowed.
        TypeError: the class has no such argument.
    """

    _skipped = Shared[int | Tensor]()
    _note = Shared[Note | None]()
    _launches = Shared[Launches | None]()
    _captured = Shared[list[Launches]]()  # CUDA graphs read their tables whenever they are replayed
    _host = Shared[Host]()
    grad_scale = Shared[Any]()  # a GradScaler sets these two for the time of a step
    found_inf = Shared[Any]()
    refused: tuple[str, ...] = ()  # arguments that would have no effect
    flat_parameters, _fused = False, None  # of instances that earlier versions have pickled
    _told = False  # of state that has no effect

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        state: str | Mapping[str, str] = "float32",
        backend: str = "auto",
        stochastic_rounding: bool = True,
        seed: int = 0,
        capturable: bool = False,
        skip_nonfinite: bool | None = None,
        offload: bool = False,
        flat_parameters: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
        amsgrad: bool = False,
        geometry: str = "adam",
        adjust_lr_fn: str | None = None,
        ns_coefficients: tuple[float, float, float] | str = NEWTON_SCHULZ,
        ns_steps: int = 5,
        **unknown: Any,
    ) -> None:
        if unknown:
            every = dict.fromkeys(["params", *defaults, *(q.name for q in OPTIONS)])
            allowed = ", ".join(name for name in every if name not in self.refused)
            raise TypeError(
                f"{type(self).__name__} got an unexpected keyword argument {next(iter(unknown))!r}; allowed: {allowed}"
            )
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend must be one of {backends.BACKENDS}, got {backend!r}")
        torch_s = {"fused": fused, "foreach": foreach, "differentiable": differentiable, "amsgrad": amsgrad}
        if foreach is True and backend == "auto":
            backend = "eager"
        check_torch_s(torch_s, backend)
        self._fused = fused
        defaults = {
            **defaults,
            # A subclass may have it among its own defaults.
            "maximize": defaults.get("maximize", False) if maximize is False else maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "capturable": capturable,
            "geometry": defaults.get("geometry", geometry),
            "adjust_lr_fn": defaults.get("adjust_lr_fn", adjust_lr_fn),
            "ns_coefficients": defaults.get("ns_coefficients", ns_coefficients),
            "ns_steps": defaults.get("ns_steps", ns_steps),
        }
        defaults = with_floats(defaults, defaults)
        self.defaults = defaults
        self.rule = self.checked_rule(defaults)
        self.state_format = state
        self._formats = self.formats_of(defaults, state)
        if skip_nonfinite not in (None, True, False):
            raise ValueError(f"skip_nonfinite must be None, True or False, got {skip_nonfinite!r}")
        check_flags({"offload": offload, "flat_parameters": flat_parameters}, "offload", "flat_parameters")
        self.offload, self.flat_parameters = offload, flat_parameters
        self._check_group(defaults)
        self.backend = backend
        self.skip_nonfinite = skip_nonfinite
        self._shared: dict[str, Any] = {"_skipped": 0}
        self._begin_anew()
        super().__init__(params, defaults)

    def _begin_anew(self) -> None:
        """Forget what calls have left for others, but not how many steps were skipped."""
        self._launches = self._note = None
        self._captured = []
        self._host = Host()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            show_options(cls.__init__, OPTIONS)
            cls.__init__ = _disable_dynamo(cls.__init__)  # type: ignore[method-assign]

    def _settings(self, group: Mapping[str, Any]) -> GroupSettings:
        if "betas" in self.defaults and len(group["betas"]) != len(self.defaults["betas"]):  # a scheduler's
            self.check(with_floats(group, self.defaults))
        if group["geometry"] != "adam":  # it may have been set since
            self.check_geometry(group)
        rule, *_ = self.rules_of(group)
        iteration = Iteration.of(type(self), group)
        return GroupSettings(rule, iteration, self.formats(group), group["stochastic_rounding"], group["seed"])

    def formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        """The format of each slot that parameters of ``group`` store, unless they are among those in full precision."""
        return {name: self._formats[name] for name in self.stored(group)}

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self.check(group)
        self.check_geometry(group)
        rule, first = self.rule_of(group), self.rule_of({**self.defaults, "geometry": group["geometry"]})
        if traced_once(rule) is not traced_once(first):
            slots, own = map(backends.slot_names, (rule, first))
            raise ValueError(f"all groups must have the rule of the first, with slots {own}, got one with {slots}")
        check_seed(group["seed"])
        check_torch_s(group)
        check_flags(group, "maximize", "stochastic_rounding", "capturable")
        if self.offload and group["capturable"]:
            raise ValueError("capturable must be False with offload=True: no graph can hold what the host computes")

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch.optim, after its hyperparameters, parameters and devices have been checked."""
        param_group = with_floats(param_group, self.defaults)
        self._check_group({**self.defaults, **param_group})
        check_torch_s(param_group, self.backend)
        own = {**{name: getattr(self, name) for name in WHOLE[1:]}, "state": self.state_format}
        # ZeroRedundancyOptimizer repeats in each group what the optimizer was given.
        if common := [name for name in WHOLE if name in param_group and param_group[name] != own[name]]:
            raise ValueError(f"{common[0]} is given to the optimizer, for all groups, got a group with {common}")
        given = param_group["params"]
        if not isinstance(given, Tensor | set):  # torch.optim takes the one and refuses the other
            given = list(given)
        entries = [given] if isinstance(given, Tensor) else given
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        if len(set(map(id, params))) < len(params):  # torch.optim warns, and updates it twice in a step
            twice = next(i for i, p in enumerate(params) if any(p is q for q in params[:i]))
            raise ValueError(f"a parameter group must have each parameter once, got number {twice} a second time")
        for p in params:
            if isinstance(p, Tensor):
                backends.choose(self.backend, CPU if self.offload else p.device)
        if {**self.defaults, **param_group}["geometry"] == "muon":
            names = [repr(entry[0]) if isinstance(entry, tuple) else str(i) for i, entry in enumerate(entries)]
            check_matrices(type(self).__name__, params, names)
        super().add_param_group({**param_group, "params": given})

    @property
    def backends_in_use(self) -> tuple[str, ...]:
        """The backends that the last step ran on, such as ``("triton",)``; empty before the first.

        "eager" among them under ``backend="auto"`` on CPUs and on CUDA or ROCm devices means that the fused backend
        failed there; a warning has said why.
        """
        return () if self._launches is None else self._launches.backends

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because a gradient was not finite. Reading it waits for the device.

        A step that a GradScaler skips without calling :meth:`step` is not counted. With ``fused=True`` and after
        :meth:`clip_grad_norm_` it always calls it.
        """
        return int(self._skipped)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to the next step.

        True with ``fused=True``, as in torch.optim, and after :meth:`clip_grad_norm_`, whose norm would not be that of
        gradients that were unscaled since.
        """
        own = [p.grad for p in self._every() if p.grad is not None]
        return bool(self._fused) or (self._note is not None and self._note.serves(own))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._fused = value

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero the gradients as in torch.optim, and what :meth:`clip_grad_norm_` has found about them."""
        self._note = None
        super().zero_grad(set_to_none)

    @_disable_dynamo
    @without_gradients
    def clip_grad_norm_(
        self,
        max_norm: float,
        grad_scale: float | Tensor | GradScaler | None = None,
        norm: float | Tensor | None = None,
    ) -> Tensor:
        """Clip the 2-norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does, within the next step.

        The gradients are read once and stay as they are: the next :meth:`step` multiplies them on its way by
        ``min(1, max_norm / (norm + 1e-6))``. It changes nothing at all if the norm is not finite, unless the optimizer
        has ``skip_nonfinite=False``.

        Args:
            max_norm: the largest norm, >= 0; ``math.inf`` to look at the norm without clipping.
            grad_scale: the GradScaler whose ``unscale_`` was not called, or whatever else the gradients have been
                multiplied by; None if they are as they should be. A GradScaler's scale is read on the device, while
                its ``get_scale()`` waits for it.
            norm: what to clip by in place of the norm of this optimizer's gradients: that of more gradients of which
                these are a part, without ``grad_scale``. A tensor of one element, or a number. For several optimizers
                in one process, :func:`ademamix.clip_grad_norm_` computes it.

        Returns:
            The norm before clipping (and without the scale), a tensor of no dimensions on the gradients' device. It
            overflows to infinity for gradients above 1e19, for float64 ones above 1e154.
        """
        every = self._every()
        own = [p.grad for p in every if p.grad is not None]
        self._check_layouts(own)
        found = clipping(every, max_norm, grad_scale, norm)
        self._note = Note(found, own)
        return found.value

    def _every(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def _check_layouts(self, grads: Sequence[Tensor]) -> None:
        """Raise RuntimeError, by group and shape, for gradients that have no norm."""
        if any(g.layout != torch.strided for g in grads):
            for i, group in enumerate(self.param_groups):
                for p in group["params"]:
                    if p.grad is not None:
                        check_layout(type(self).__name__, i, p, p.grad)

    def _factor_and_skip(self, own: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Of the parameters' own gradients, and of these placed as the parameters are."""
        norm = self._note.norm if self._note is not None and self._note.serves(own) else None
        if norm is None and self.skip_nonfinite:
            self._check_layouts(own)
            norm = Norm(global_norm(grads, self._every()), None, None)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return factor_and_skip(norm, scale, found_inf, self.skip_nonfinite is not False)

    def _count(self, skip: Tensor) -> None:
        if skip.device.type == "cpu":
            self._skipped += int(skip)
        else:
            self._skipped += sent_to(getattr(self._skipped, "device", skip.device), skip)

    def _count_on(self, device: torch.device) -> None:
        """Count skipped steps there from now on: a graph that made the count would set it anew in each replay."""
        if device != CPU and getattr(self._skipped, "device", CPU) == CPU:
            self._skipped = torch.full((), int(self._skipped), device=device)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # torch.compile has nothing to gain in a step, and its tracing of one fails
    @without_gradients
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Nothing is changed, and ``skipped_steps`` counts it, if :meth:`clip_grad_norm_` or a GradScaler (or, with
        ``skip_nonfinite=True``, the step itself) has seen a gradient that is not finite.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` returns.

        Raises:
            RuntimeError: a gradient is sparse, a dtype is not served, a tensor has no memory or shares it, the
                gradients were clipped before a GradScaler unscaled them, or a CUDA graph captures a step that is not
                ``capturable``, the first of its kind or on other devices too; nothing has been changed then.
            ValueError: a state tensor does not fit its parameter; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._update()
        self._note = None
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch.optim makes of ``step``; if it raises, what a GradScaler has left for it is gone too."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hooked(self, *args, **kwargs)
            except BaseException:
                del self.grad_scale, self.found_inf
                raise

        return step

    def _update(self) -> None:
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = list(chain.from_iterable(active))
        own: list[Any] = [p.grad for p in params]
        captured = is_captured(params, self.param_groups)
        grads = gradients(params, own)
        fake = grads is not own and any(map(backends.is_fake, grads))
        factor, skip = (None, None) if fake else self._factor_and_skip(own, grads)
        if skip is not None and (not params or skip.device.type == "cpu"):
            self._count(skip)
            if not params or skip:  # other processes may have gradients, and waited for this process' part of the norm
                self._left_out(own)
                return
            skip = None
        if not params:
            return
        counted_there = any(group["capturable"] for group in self.param_groups)
        counted_there |= skip is not None and not self.offload
        inputs = Inputs(
            params,
            grads,
            [i for i, members in enumerate(active) for _ in members],
            [self._settings(group) for group in self.param_groups],
            counted_there and not fake,
            self.state,
        )
        run = self._run_on_host if self._on_host(params[0]) else self._run
        with backends.mode_of(grads) if fake else _out_of_inference_mode(params):
            run(inputs, factor, skip, captured)

    def _left_out(self, own: Sequence[Tensor]) -> None:
        """What becomes of gradients whose step is skipped."""

    def _on_host(self, p: Tensor) -> bool:
        """Whether the parameter is stepped on the host: one that has numbers to send there."""
        return self.offload and not p.is_meta and not backends.is_fake(p)

    @without_gradients  # which leaving inference mode has turned on
    def _run(self, inputs: Inputs, factor: Tensor | None, skip: Tensor | None, captured: bool) -> None:
        program = self._program(offload=False)
        launches = self._launches_for(program, inputs.params, inputs, captured)
        if inputs.counted_there:
            self._count_on((inputs.params[0] if skip is None else skip).device)
        with uninterrupted():
            self._take(launches, inputs.params, program, inputs.grads, factor, skip)
            if skip is not None:
                self._count(skip)

    @without_gradients
    def _run_on_host(self, inputs: Inputs, factor: Tensor | None, skip: Tensor | None, captured: bool) -> None:
        program = self._program(offload=True)
        for i, p, g in zip(inputs.of_group, inputs.params, inputs.grads, strict=True):
            check_tensors(program, i, p, g)
        stand_ins = self._host.stand_ins(program.name, inputs.params, self.state)
        trip = Trip(self._host, inputs.params, inputs.grads)
        there = inputs._replace(params=stand_ins, grads=trip.arriving())
        launches = self._launches_for(program, inputs.params, there, captured)
        trip.begin(launches.chunks)  # under way before the host waits to know what to do with them
        factor, skip = (None if t is None else t.to(CPU) for t in (factor, skip))
        if skip:
            trip.all_arrived()  # the gradients' memory may be used for other things once the step is over
            trip.finish()
            self._skipped += 1
        else:
            with uninterrupted():
                self._take(launches, inputs.params, program, there.grads, factor, None, trip)
                trip.finish()

    def _take(self, launches: Launches, params: Sequence[Tensor], *given: Any) -> None:
        """Take the step, take over states that a first one has made, and tell autograd that parameters have changed."""
        try:
            launches.run(*given)
        except BaseException:
            if launches.fresh:  # what it has written into new state is nobody's
                self._launches = None
            raise
        if launches.fresh:
            self.state.update(zip(params, launches.states, strict=True))
            launches.taken_over(self.state)
        if not launches.filters:
            increment_version(params)  # state is in nobody's graph

    def _program(self, offload: bool) -> Program:
        rules = dict.fromkeys(chain.from_iterable(map(self.rules_of, self.param_groups)))
        names = tuple(dict.fromkeys(chain.from_iterable(map(backends.coefficient_names, rules))))
        source = Source(self.coefficients, names, self.param_groups)
        return Program(type(self).__name__, source, self._formats, self.backend, offload, self.flat_parameters)

    def _launches_for(self, program: Program, params: Sequence[Tensor], inputs: Inputs, captured: bool) -> Launches:
        """The last step's, or new ones if they no longer serve.

        Args:
            params: the optimizer's; ``inputs`` has placeholders for those whose state is on the host.
        """
        launches = self._launches
        if launches is None or not launches.serve(inputs):
            if captured:  # each replay would set new state to zero
                raise RuntimeError(
                    "a CUDA graph cannot capture the first step, nor the first with these parameters, settings or "
                    "dtypes of gradients: take such a step before the capture"
                )
            saved = [self.state.get(p) for p in params]
            if program.offload:
                saved = list(map(with_master, saved, params, inputs.params))
            with uninterrupted():  # what fails to compile leads to another backend: no signal may look like that
                self._launches = launches = Launches(program, inputs, saved)
            if not self._told:
                self._told = True
                self._warn_of_full_precision()
        if captured and launches not in self._captured:
            self._captured.append(launches)
        return launches

    def _warn_of_full_precision(self) -> None:
        """Warn where ``state`` has no effect on any parameter, and would have with ``flat_parameters``."""
        every = [(p, self.formats(group)) for group in self.param_groups for p in group["params"]]
        low, low_if_flat = (
            any(are_low(slot_formats(p, formats, flat)) for p, formats in every)
            for flat in (self.flat_parameters, True)
        )
        if low_if_flat and not low:
            backends.warn(
                f"state={self.state_format!r} has no effect: no parameter has two dimensions and {SMALLEST} elements "
                "or more, and the state of all others keeps full precision. If those of one dimension are flattened, "
                "or parts of flattened ones, as of DeepSpeed ZeRO, FSDP1 and Megatron, give flat_parameters=True."
            )

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, exactly: state keeps its own dtype, whatever that of the parameter is.

        Tensors that fit as they are become the optimizer's own, without a copy, as in torch.optim.

        Raises:
            ValueError: groups, parameters or the shape of a state tensor do not fit; nothing has been changed then.
        """
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        def take(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            final = {**final, "param_groups": [with_floats(g, self.defaults) for g in final["param_groups"]]}
            self._check_loaded(final)
            loaded.extend(self._loaded(final))
            # torch would make a copy of each tensor in the parameter's dtype.
            ids = set(chain.from_iterable(group["params"] for group in final["param_groups"]))
            return {**final, "state": {i: value for i, value in final["state"].items() if i not in ids}}

        with uninterrupted():
            # Between the user's own hooks: these have changed the dict before, and see the whole state after.
            hooks = (
                self.register_load_state_dict_pre_hook(take),
                self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded), prepend=True),
            )
            try:
                super().load_state_dict(state_dict)
            finally:
                for hook in hooks:
                    hook.remove()

    def _loaded(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter that has a state in there, and this state as it is to be."""
        for p, saved in self._by_parameter(state_dict):
            kept = {key: value for key, value in saved.items() if value is not None}  # the authors store None for none
            like = p
            if self._on_host(p):
                like = self._host.stand_in(p, kept.get(MASTER)).whole
                kept = with_master(kept, p, like)
            else:
                kept.pop(MASTER, None)
            formats = {
                name: f for name, f in slot_formats(like, self._formats, self.flat_parameters).items() if name in kept
            }
            exact, step = renewed(state_of(kept, like, formats), like, formats), kept["step"]
            yield p, {**exact, "step": step if backends.is_fake(step) else counter(float(step))}

    def _by_parameter(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        return [(p, state_dict["state"][i]) for i, p in zip(ids, own, strict=False) if state_dict["state"].get(i)]

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        name = type(self).__name__
        groups = [{**self.defaults, **self.earlier, **group} for group in state_dict["param_groups"]]
        for group in groups:
            self._check_group(group)
        for group, own in zip(groups, self.param_groups, strict=False):
            if group["geometry"] == "muon":
                check_matrices(name, own["params"], own.get("param_names") or range(len(own["params"])))
        known = {"step", MASTER, *chain.from_iterable((slot, f"{slot}_scale") for slot in self._formats)}
        needed = set(self._formats).intersection(*map(self.stored, groups))
        for index, (p, saved) in enumerate(self._by_parameter(state_dict)):
            if "step" not in saved:
                raise ValueError(f"{name}: state of parameter {index} has no 'step'; it has {sorted(saved)}")
            check_state(saved, p, slot_formats(p, self._formats, self.flat_parameters))
            missing, foreign = sorted(needed - saved.keys()), sorted(saved.keys() - known)
            if missing and foreign:  # a user may add entries to a state
                raise ValueError(f"{name}: state of parameter {index} has {foreign}, but no {missing}")

    @_disable_dynamo
    def __getstate__(self) -> dict[str, Any]:
        own = (
            "state_format",
            "_formats",
            "backend",
            "skip_nonfinite",
            "_skipped",
            "offload",
            "flat_parameters",
            "_fused",
        )
        kept = {name: getattr(self, name) for name in own}
        return {**super().__getstate__(), **kept}

    @_disable_dynamo
    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # of a copy or a pickle
            state = {**state}
            self._shared = {"_skipped": state.pop("_skipped")}
            defaults = dict(state["defaults"])
            super().__setstate__({**state, "defaults": {**defaults}})
            self.defaults = defaults  # without what torch.optim adds, which groups would get with the next load
            self.rule = traced_once(self.rule_of(defaults))
        else:  # of load_state_dict: wrappers keep the dict and the list that they have
            self.state.clear()
            self.state.update(state["state"])
            self.param_groups[:] = state["param_groups"]
        self._begin_anew()
        for group in self.param_groups:  # checkpoints of the reference implementation lack the newer entries
            for name, value in {**self.defaults, **self.earlier}.items():
                group.setdefault(name, value)


OPTIONS = [q for q in inspect.signature(RuleOptimizer).parameters.values() if q.kind is q.KEYWORD_ONLY]


def _out_of_inference_mode(params: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Where state is made that a step outside of that mode can change too, unless parameters are bound to it."""
    inside = torch.is_inference_mode_enabled() and not any(map(Tensor.is_inference, params))
    return torch.inference_mode(False) if inside else nullcontext()
