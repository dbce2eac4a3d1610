"""`Examination`: every op of a program seen, shadowed in FP32, and put before the detectors.

::

    op of the program ─→ Execution: runs it, and its FP32 shadow ─→ OpEvent ─→ detectors ─→ suspicions
                                                                                   │
    findings ←─ reached a gradient, parameter, buffer, Python ←─ Marks travel ←────┘

One dispatch mode sees forward, backward and optimizer alike. Models under ``torch.compile`` run eagerly below it, so
what is examined are eager numerics. It costs 5 to 100 times the step on a CPU: a few steps are enough. What it costs on
a GPU is not measured; there the host waits about once for every op.

Nothing in here may end or change the program that is examined: what fails is kept, and reported once as HS506 or HS507.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from halfstep.doctor.detectors import DETECTORS
from halfstep.doctor.detectors.data import bad_data
from halfstep.doctor.detectors.gradients import GradientFlush
from halfstep.doctor.detectors.loss_scale import LOSS, ScaleCourse
from halfstep.doctor.event import LOW_PRECISION, Detector, OpEvent, Suspicion, Value, floats, measure
from halfstep.doctor.execution import Execution, beside_the_run, facts_of
from halfstep.doctor.finding import Finding, Severity, Silence, ordered, without_silenced
from halfstep.doctor.lints.keeping import groups_of
from halfstep.doctor.marks import Marks, differs, kind_of
from halfstep.doctor.shadow import Shadows, elements_of, named, storage_key
from halfstep.observe.attribution import Attribution
from halfstep.observe.place import Place

_OF_UPDATES = ("HS301", "HS303", "HS406", "HS407")  # and the differences that compensation is made of
#: Ops that hand a value to Python.
_READS = ("_local_scalar_dense", "equal", "is_nonzero", "allclose")

#: Runs an op otherwise than the program says: what remedies are tried with.
Change = Callable[[Any, tuple[Any, ...], dict[str, Any], Place], tuple[Any, tuple[Any, ...], dict[str, Any]]]


class Examination:
    """Examine everything that runs while entered.

    Args:
        silence: rules for findings to drop, as `Silence.parse` reads them.
        detectors: functions from an event to suspicions; all there are by default.
        change: called before every op, may give another op or other arguments.
        found: called with each finding as soon as it is one.

    Attributes:
        attribution: where ops run; it knows modules and optimizers seen.
        course: loss scale and skips so far.
    """

    def __init__(
        self,
        *,
        silence: Sequence[str | Silence] = (),
        detectors: Sequence[Detector] = DETECTORS,
        change: Change | None = None,
        found: Callable[[Finding], None] | None = None,
    ) -> None:
        self._silence = [Silence.parse(rule) if isinstance(rule, str) else rule for rule in silence]
        self._detectors = detectors
        self._change = change
        self._tell = found
        self.attribution = Attribution()
        self._shadows = Shadows()
        self._execution = Execution(self._shadows, self._not_followed)
        self._findings: dict[tuple[str, Place | None], Finding] = {}
        self._order: dict[tuple[str, Place | None], int] = {}  # in which they were first suspected
        self._notes: dict[str, Finding] = {}
        self._failed_detectors: set[str] = set()
        self._marks = Marks(self._reached)
        self.course = ScaleCourse()
        self.flush = GradientFlush()
        self._mode = _Mode(self)
        self._handles: list[Any] = []
        self._hooked = WeakTensorKeyDictionary()
        self._roots_known = 0
        self._stepped: set[int | None] = set()  # storages of parameters that optimizers step
        self._stepped_at = 0
        self._made_up, self._made_up_at = False, 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Examination:
        self._stack.enter_context(self.attribution)
        self._stack.enter_context(self.course)
        self._stack.enter_context(self._losses_seen())
        self._stack.enter_context(self._mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with self._safely("the end of the examination"), beside_the_run():
            self._look_at_state()
            for finding in self.flush.finished():
                self._report(finding)

    def returned(self, value: Any) -> None:
        """Say that the program gave this value to its caller: what it holds has consequences."""
        with self._safely("the returned value"):
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor):
                    self._arrived(leaf, "the returned value")

    def findings(self) -> list[Finding]:
        """What was found so far, worst first; rules of silence applied."""
        keys = sorted(self._findings, key=lambda key: self._order.get(key, len(self._order)))
        found = [self._findings[key] for key in keys]
        with self._safely("the course of the loss scale"):
            found = self.course.judge(found)
        # A constant that vanishes at a place explains the zeros there.
        explained = {finding.place for finding in found if finding.code == "HS401"}
        found = [finding for finding in found if finding.code != "HS106" or finding.place not in explained]
        return ordered(without_silenced([*found, *self._notes.values()], self._silence))

    # ------------------------------------------------------------------ one op

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op of the program."""
        facts = facts_of(func)
        if facts.is_view or facts.namespace == "profiler":
            return func(*args, **kwargs)
        place = self.attribution.place(func, args)
        if self._change is not None:
            func, args, kwargs = self._change(func, args, kwargs, place)
        marks: set[int] = set()
        with self._safely("the marks of inputs"):
            marks = self._marks_of((args, kwargs))
            self._follow_modules()
            if facts.name in _READS:
                self._marks.reach(marks, "Python")
            elif facts.name == "_amp_foreach_non_finite_check_and_unscale_":
                self._marks.reach(marks, "a scaled gradient")
        result, event = self._execution.run(func, args, kwargs, place, self.attribution.step)
        with self._safely("looking at an op"), beside_the_run():
            self._conclude(event, marks)
        if event.error is not None:
            raise event.error
        return result

    def _conclude(self, event: OpEvent, marks: set[int]) -> None:
        """Ask the detectors about an op, and pass marks on to what it made."""
        if event.place.phase == "optimizer":
            self._follow_optimizers()
            stepped = enumerate(tensors_of(event))
            event.parameters = {i for i, tensor in stepped if storage_key(tensor) in self._stepped}
        elif event.place.phase == "backward":
            self.flush.see(event)
        forward = event.place.phase == "forward"
        asked = (value for value in event.inputs if (forward and value.shadow is not None) or self._is_new(value))
        measure([*event.outputs, *asked])  # all that detectors ask of most ops, with one wait
        given: dict[int, set[int]] = {}
        decided: set[int] = set()
        for suspicion in [*self._data(event), *self._suspicions(event)]:
            if suspicion.finding.code in _OF_UPDATES and event.place.phase == "optimizer" and self._is_made_up_for():
                continue
            number = self._add(event, suspicion, marks)
            if number is not None:
                for output in suspicion.outputs:
                    given.setdefault(output, set()).add(number)
                decided |= {number} if kind_of(suspicion.finding.code) == "decisions" else set()
        for index, value in enumerate(event.outputs):
            entry = self._shadows.entry(value.tensor)
            if entry is None:
                continue
            carried = self._marks.carried(marks, value) if marks else set()
            is_whole = value.tensor.numel() >= elements_of(value.tensor)
            before = set() if is_whole else entry.marks  # written into a part: the rest holds what it held
            entry.marks = before | carried | given.get(index, set())
            if entry.marks and event.place.phase == "optimizer" and storage_key(value.tensor) in self._stepped:
                self._marks.reach(entry.marks, f"the parameter {event.place.parameter or 'that is stepped'}")
        for tensor, _ in event.decisions:
            entry = self._shadows.made(tensor, event.place)
            if entry is not None:
                entry.marks = marks | decided

    def _data(self, event: OpEvent) -> Iterator[Suspicion]:
        """inf and NaN in what comes from outside: looked for once, where a tensor is first used."""
        for value in event.inputs:
            if self._is_new(value):
                self._shadows.made(value.tensor, None)
                yield from bad_data(event, value, self.attribution.parameter_name(value.tensor))

    def _is_new(self, value: Value) -> bool:
        return value.made_by is None and self._shadows.entry(value.tensor) is None

    def _suspicions(self, event: OpEvent) -> Iterator[Suspicion]:
        for detector in self._detectors:
            name = getattr(detector, "__name__", repr(detector))
            if name in self._failed_detectors:
                continue
            try:
                yield from list(detector(event))
            except Exception as error:
                self._failed_detectors.add(name)
                self._note("HS506", event.place, f"the detector {name!r} failed: {type(error).__name__}: {error}")

    def _add(self, event: OpEvent, suspicion: Suspicion, marks: set[int]) -> int | None:
        """Report a suspicion, or mark it; the number of its mark."""
        finding = replace(suspicion.finding, step=event.step)
        if event.place.phase == "backward" and self.course.scale is not None:
            finding = replace(finding, numbers={**finding.numbers, "loss_scale": self.course.scale})
        self._order.setdefault((finding.code, finding.place), len(self._order))
        if not suspicion.outputs:
            self._report(finding)
            return None
        gross = any(differs(event.outputs[output])[1] for output in suspicion.outputs)
        return self._marks.add(finding, (finding.code, finding.place), gross, marks)

    # ------------------------------------------------------------------ where effects arrive

    def _marks_of(self, values: Any) -> set[int]:
        marks: set[int] = set()
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                entry = self._shadows.entry(leaf)
                if entry is not None and entry.marks:
                    marks |= entry.marks
        return marks

    @contextlib.contextmanager
    def _losses_seen(self) -> Iterator[None]:
        """What a backward pass starts from is a loss. Its gradients need not tell: that of ``x * x`` is finite where
        the square is not."""
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            with self._safely("the loss"):
                for loss in tree_leaves(tensors):
                    self._arrived(loss if isinstance(loss, Tensor) else None, LOSS)
            return original(tensors, *args, **kwargs)

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original

    def _arrived(self, tensor: Tensor | None, what: str) -> None:
        entry = None if tensor is None else self._shadows.entry(tensor)
        if entry is not None and entry.marks:
            self._marks.reach(entry.marks, what)

    def _follow_modules(self) -> None:
        """Watch the gradients of modules seen for the first time."""
        roots = self.attribution.roots
        if len(roots) == self._roots_known:
            return
        self._roots_known = len(roots)
        for root in roots:
            for parameter in root.parameters():
                if parameter.requires_grad and parameter.is_leaf and parameter not in self._hooked:
                    self._hooked[parameter] = True
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_arrived))  # type: ignore[no-untyped-call]  # as above

    def _gradient_arrived(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        with self._safely("a gradient"), _disable_current_modes(), beside_the_run():
            name = self.attribution.parameter_name(parameter) or "a parameter"
            self._arrived(gradient, f"the gradient of {name}")
            step = self.attribution.step
            for finding in self.flush.accumulated(name, gradient, self._shadows.get(gradient), step, self.course.scale):
                self._report(finding)

    def _follow_optimizers(self) -> None:
        """Know the parameters of optimizers, and look at their gradients before they are used up."""
        step = self.attribution.step
        if self._stepped_at == step:
            return
        self._stepped_at = step
        for optimizer in self.attribution.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._stepped.add(storage_key(parameter))
                    if parameter.grad is not None:
                        name = self.attribution.parameter_name(parameter) or "a parameter"
                        self._arrived(parameter.grad, f"the gradient of {name}")

    def _is_made_up_for(self) -> bool:
        """Whether what 16-bit weights lose is kept beside them: by masters, compensation, or stochastic rounding."""
        if self._made_up_at != self.attribution.step:
            self._made_up_at = self.attribution.step
            groups = groups_of(self.attribution.optimizers, None)
            low = [group for group in groups if any(p.dtype in LOW_PRECISION for p in group.parameters)]
            self._made_up = bool(low) and not any(group.bare for group in low)
        return self._made_up

    def _look_at_state(self) -> None:
        """Look for effects in parameters, their gradients, buffers and optimizer state."""
        for root in self.attribution.roots:
            for name, parameter in root.named_parameters():
                self._arrived(parameter, f"the parameter {name}")
                self._arrived(parameter.grad, f"the gradient of {name}")
            for name, buffer in root.named_buffers():
                self._arrived(buffer, f"the buffer {name}")
        for optimizer in self.attribution.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._arrived(parameter, f"the parameter {self.attribution.parameter_name(parameter)}")
            for state in optimizer.state.values():
                for key, value in state.items() if isinstance(state, dict) else ():
                    if isinstance(value, Tensor):
                        self._arrived(value, f"the optimizer's {key}")

    # ------------------------------------------------------------------ findings

    def _reached(self, finding: Finding, what: str) -> None:
        self._report(replace(finding, numbers={**finding.numbers, "reached": what}))

    def _report(self, finding: Finding) -> None:
        key = (finding.code, finding.place)
        known = self._findings.get(key)
        if known is not None:
            worse = finding if finding.severity > known.severity else known
            self._findings[key] = replace(worse, count=known.count + finding.count, step=known.step)
            return
        self._findings[key] = finding
        if self._tell is not None and without_silenced([finding], self._silence):
            self._tell(finding)

    def _not_followed(self, what: str, error: BaseException) -> None:
        self._note("HS507", None, f"{what} could not be computed: {type(error).__name__}: {error}")

    def _note(self, code: str, place: Place | None, what: str) -> None:
        text = what.splitlines()[0][:300]
        if text not in self._notes:
            remedy = "Findings that would have depended on it are missing; the run itself is not affected."
            self._notes[text] = Finding(code, place, text, "It was left out from there on.", remedy, Severity.NOTE)

    @contextlib.contextmanager
    def _safely(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._note("HS506", None, f"{doing} failed: {type(error).__name__}: {error}")


class _Mode(TorchDispatchMode):
    """Hands every op to the examination."""

    def __init__(self, examination: Examination) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch lacks annotations here
        self._examination = examination

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "FakeTensor" for kind in types):  # of a compiler at work: no numbers in them
            return func(*args, **(kwargs or {}))
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # DTensor and the like: their own handlers run ops on the tensors inside, seen here
        return self._examination.run(func, args, kwargs or {})


def tensors_of(event: OpEvent) -> list[Tensor]:
    """The floating tensors among an op's arguments, in the order of `OpEvent.inputs`."""
    return [t for _, value in named(event.func, event.args, event.kwargs) for t in floats(value)]
