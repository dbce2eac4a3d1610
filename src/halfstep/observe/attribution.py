"""`Attribution`: which module, line and phase the op that runs now belongs to, forward and backward.

    with Attribution() as attribution, my_dispatch_mode:   # whose __torch_dispatch__ asks attribution.place(func)
        train()

Forward is a stack of modules, kept by global hooks, and the innermost script frame. Backward has neither: autograd's
engine runs nodes. But every node carries the number it got when its op ran forward, and below autograd (where a
dispatch mode sits) the newest number is that of the node just made for the op that runs. So numbers are noted down with
module and line in forward, and looked up in backward. The rules that make it exact:

- Modules entered while a node is evaluated are checkpoint recomputation: forward ops, under the names they had before.
- A number is noted once, also while gradients are off: a custom ``autograd.Function`` makes its node before its ops.
- Numbers made between two ops belong to the first of them: in-place writes into views renumber nodes after the fact.
- Nodes made in backward (double backward) belong to where the node that makes them belongs.
- ``AccumulateGrad`` has no number, but a parameter.

Numbers are counted per thread. On accelerators backward runs on a thread of the device, where nodes made by
recomputation start a count of their own. Whose count a node's number is of:

- Nodes made there inside of modules are tagged in ``node.metadata`` when their outermost module ends.
- A backward pass that a node begins while it is evaluated (reentrant checkpointing) runs through what that node made.
- All others were made in forward.

Such a thread has no frames of the script either, and on the CPU those outside of the backward pass have not called what
is recomputed in it: where PyTorch's own containers recompute, an op is on the line that it was on before.

The remaining hole is a double backward through nodes made on such a thread.
"""

from __future__ import annotations

import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _current_autograd_node as current_node
from torch._C import _current_graph_task_id as graph_task
from torch._C._autograd import _get_sequence_nr as next_number
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from halfstep.observe import source_line
from halfstep.observe.lines import Call, Line, Scope, Thread, op_name
from halfstep.observe.names import Names
from halfstep.observe.place import Phase, Place
from halfstep.observe.stepping import Optimizers

#: Numbers kept per thread; the older half is dropped beyond it. A step has some thousands.
_KEPT_NUMBERS = 1 << 19
_NO_NUMBER = (1 << 64) - 1  # of AccumulateGrad


def remember(failures: list[str], where: str, error: BaseException) -> None:
    """Keep one line on an exception of our own that must not reach the user's run; each once, sixteen at most."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    at = f" ({frame[0].filename}:{frame[0].lineno})" if frame else ""
    text = f"{where}: {type(error).__name__}: {error}{at}"
    if text not in failures and len(failures) < 16:
        failures.append(text)


class Attribution:
    """Follows modules, autograd nodes and optimizers while entered; entering it again while entered is fine.

    Attributes:
        failures: exceptions inside, one line each; they never reach the run, whose ops are then only named.
        unknown: ops of backward nodes that were made before this was entered.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.unknown = 0
        self._entered = 0
        self._handles: list[Any] = []
        self._names = Names()
        self._outside = Scope("", "", None)
        self._nowhere = Line(self._outside, None, None, None)
        self._scopes: dict[int, tuple[weakref.ref[nn.Module], Scope]] = {}  # as of their latest forward call
        self._local = threading.local()
        self._threads: list[Thread] = []
        self._stepped = Optimizers()
        self._refreshed = -1
        self._filter: Any = None

    def __enter__(self) -> Attribution:
        self._entered += 1
        if self._entered == 1:
            for thread in self._threads:
                thread.next, thread.line = -1, None
                thread.calls.clear()
                thread.stepping.clear()
            self._thread().next = next_number()
            self._handles = [
                register_module_forward_pre_hook(self._guarded(self._called)),
                register_module_forward_hook(self._guarded(self._returned), always_call=True),
                register_optimizer_step_pre_hook(self._guarded(self._step_begins)),
                register_optimizer_step_post_hook(self._guarded(self._step_ends)),
            ]
            # Calling a compiled module warns of hooks like ours, which its user never asked for.
            warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
            self._filter = warnings.filters[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            if self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]  # a list, typed as a sequence

    @property
    def step(self) -> int:
        """Steps taken by the optimizer that took most, plus 1."""
        return self._stepped.taken + 1

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """The outermost modules called that are still alive."""
        return self._names.roots

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers seen stepping that are still alive."""
        return self._stepped.alive

    def parameter_name(self, tensor: Tensor) -> str | None:
        """``blocks.3.mlp.wo.weight``; ``group0[3]`` for what only an optimizer knows; None for any other tensor."""
        known = self._parameter(tensor)
        return known[0] if known is not None else self._stepped.position(tensor)

    def newest_node(self) -> tuple[int, int]:
        """What tells the newest node made by this thread from all others, inside ``__torch_dispatch__``."""
        return id(self._thread()), next_number() - 1

    def running_node(self) -> tuple[int, int] | None:
        """What `newest_node` said of the node that is evaluated now; None outside of backward and where not known."""
        node: Any = current_node()
        number = getattr(node, "_sequence_nr", None)
        if number is None:
            return None
        maker = self._maker(node, number(), self._thread())
        return None if maker is None else (id(maker), number())

    def place(self, func: Any, args: Sequence[Any] = ()) -> Place:
        """Where the op `func` runs, asked inside ``__torch_dispatch__`` before the op is run.

        With its arguments, ops of an optimizer on a single parameter name that parameter.
        """
        try:
            return self._place(func, args)
        except Exception as error:
            remember(self.failures, "attribution", error)
            return Place(op_name(func))

    def _place(self, func: Any, args: Sequence[Any]) -> Place:
        thread = self._thread()
        node: Any = current_node()
        calls = thread.calls
        if node is not None and not (calls and calls[-1].node is node):
            line = self._line_of(node, thread)
            again = self._recomputed(func, line) if line is not None and torch.is_grad_enabled() else None
            if again is not None:
                self._note(thread, again)
                return again.place(again.forward, func, "forward")
            if line is None:
                return self._accumulates(func, node.variable, thread)
            self._note(thread, line)
            return line.place(line.backward, func, "backward")
        if node is None and graph_task() != -1:  # the engine's own ops, after a node
            line = thread.line or self._nowhere
            return line.place(line.backward, func, "backward")
        thread.is_forward = thread.is_forward or node is None
        scope = calls[-1].scope if calls else self._outside
        line = self._script_line(scope) if node is None else self._line_again(scope, node, thread, func)
        self._note(thread, line)
        if thread.stepping and node is None and thread.stepping[-1].covers(len(calls)):
            target = self._stepped.parameter_of(args[0]) if args and isinstance(args[0], Tensor) else None
            return self._at_parameter(func, target, line, "optimizer")
        return line.place(line.forward, func, "forward")

    def _thread(self) -> Thread:
        thread: Thread | None = getattr(self._local, "thread", None)
        if thread is None:
            thread = self._local.thread = Thread()
            self._threads.append(thread)
        return thread

    def _script_line(self, scope: Scope, frame: FrameType | None = None) -> Line:
        frame = frame or source_line.script_frame()
        key = (0, 0) if frame is None else (id(frame.f_code), frame.f_lineno)
        line = scope.lines.get(key)
        if line is None:
            file = None if frame is None else source_line.shown(frame.f_code.co_filename)
            line = Line(scope, frame and frame.f_code, file, frame and frame.f_lineno)
            scope.lines[key] = line
        return line

    def _line_again(self, scope: Scope, node: Any, thread: Thread, func: Any = None) -> Line:
        """The line of what a node runs again in a module: the script's inside of it, else the one it was on before."""
        frame = source_line.script_frame(in_backward=True)
        if frame is not None:
            return self._script_line(scope, frame)
        around = self._line_of(node, thread) or self._nowhere
        known = [line for line in reversed(scope.lines.values()) if func is None or func in line.forward]
        for line in known:  # where a module is called on several lines: the one that was checkpointed
            if line.code is around.code and line.number == around.number:
                return line
        if known:
            return known[0]
        key = (0 if around.code is None else id(around.code), around.number or 0)
        return scope.lines.setdefault(key, Line(scope, around.code, around.file, around.number))

    def _note(self, thread: Thread, line: Line) -> None:
        """Book the nodes made since the last op: the newest on this line, those before it on the op before."""
        number = next_number()
        if number != thread.next:
            if thread.next < 0:
                thread.next = number - 1
            numbers = thread.numbers
            for between in range(thread.next, number - 1):
                numbers.setdefault(between, thread.line or line)
            numbers.setdefault(number - 1, line)
            thread.next = number
            if len(numbers) > _KEPT_NUMBERS:
                thread.numbers = dict(list(numbers.items())[len(numbers) // 2 :])
        thread.line = line

    def _line_of(self, node: Any, thread: Thread) -> Line | None:
        """The forward line that a node was made on; None for ``AccumulateGrad``, which belongs to no line."""
        number = node._sequence_nr()
        if number == _NO_NUMBER:
            return None
        maker = self._maker(node, number, thread)
        if maker is None:
            self.unknown += 1
            return self._nowhere
        return maker.numbers[number]

    def _maker(self, node: Any, number: int, thread: Thread) -> Thread | None:
        """The thread that made a node which `thread` evaluates; None if its number was not noted."""
        if thread.is_forward:
            if number in thread.numbers:
                return thread
        else:
            tagged: Thread | None = node.metadata.get(self)
            if tagged is not None and number in tagged.numbers:
                return tagged
            if number in thread.numbers and source_line.begun_by_a_node():
                return thread
        others = [other for other in self._threads if other.is_forward] + [thread]
        return next((other for other in others if number in other.numbers), None)

    def _recomputed(self, func: Any, line: Line) -> Line | None:
        """The forward line of an op that checkpointing runs again outside of modules entered since; else None."""
        if not source_line.recomputes():
            return None
        frame = source_line.script_frame(in_backward=True)
        scope: Scope | None = line.scope
        if frame is None:  # a function of PyTorch's, checkpointed itself: it is on the line that did so
            return line
        while scope is not None:
            # The module whose node wants the recomputed values, or one around it, has run this op on this line before.
            # (The line alone is not enough: `lin(relu(x))` is also where the op inside of PyTorch's `lin` was called.)
            known = scope.lines.get((id(frame.f_code), frame.f_lineno))
            if known is not None and func in known.forward:
                return known
            scope = scope.parent
        return self._script_line(line.scope, frame)

    def _accumulates(self, func: Any, variable: Any, thread: Thread) -> Place:
        if self.parameter_name(variable) is None:  # an input that wants its gradient: said of the op that made it
            line = thread.line or self._nowhere
            return line.place(line.backward, func, "backward")
        return self._at_parameter(func, variable, self._nowhere, "backward")

    def _at_parameter(self, func: Any, tensor: Tensor | None, line: Line, phase: Phase) -> Place:
        """Accumulation into a parameter's gradient, or an update of a parameter or of its optimizer state."""
        known = line.backward if phase == "backward" else line.optimizer
        name = None if tensor is None else self.parameter_name(tensor)
        if tensor is None or name is None:
            return line.place(known, func, phase)
        found = known.get((func, name))
        if found is None:
            owner = self._parameter(tensor)
            module = "" if owner is None else name.rpartition(".")[0] or owner[1]
            kind = "" if owner is None else owner[1]
            found = known[func, name] = Place(op_name(func), phase, module, kind, line.file, line.number, name)
        return found

    def _parameter(self, tensor: Tensor) -> tuple[str, str] | None:
        known = self._names.parameter(tensor)
        if known is None and isinstance(tensor, nn.Parameter) and self._refreshed != self.step:
            self._refreshed = self.step  # parameters may come late, but a look at all modules once a step is enough
            self._names.refresh()
            known = self._names.parameter(tensor)
        return known

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            if torch.compiler.is_dynamo_compiling():  # traced away; under a dispatch mode nothing is compiled
                return
            try:
                hook(*args)
            except Exception as error:
                remember(self.failures, "attribution", error)

        return guarded

    def _called(self, module: nn.Module, args: Any) -> None:
        thread = self._thread()
        node = current_node()
        around = thread.calls[-1] if thread.calls else None
        scope_around = around.scope if around is not None else self._outside
        if thread.next not in (-1, next_number()) and (node is None or around is not None):
            # Nodes without an op yet. With gradients off, that of a Function which calls this module (checkpointing).
            line = thread.line if torch.is_grad_enabled() else None
            if line is None:
                line = self._script_line(scope_around) if node is None else self._line_again(scope_around, node, thread)
            self._note(thread, line)
        latest = self._scopes.get(id(module))
        if node is not None and latest is not None and latest[0]() is module:
            thread.calls.append(Call(module, latest[1], None, node))
            return
        tree = around.tree if around is not None and around.tree is not None else self._names.add_root(module)
        path = self._names.path(tree, module)
        kind = type(module).__name__
        if path is None:  # called by a module that does not own it
            path = f"{scope_around.module}.{kind}" if scope_around.module else kind
        if latest is not None and latest[0]() is module and latest[1].module == (path or kind):
            scope = latest[1]
            scope.parent = scope_around if scope_around is not scope else scope.parent
        else:
            scope = Scope(path or kind, kind, scope_around)
            self._scopes[id(module)] = (weakref.ref(module), scope)
        thread.calls.append(Call(module, scope, tree, node))

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        thread = self._thread()
        calls = thread.calls
        for depth in range(len(calls) - 1, -1, -1):
            if calls[depth].module is module:
                node = calls[depth].node
                # What is still above it was left by an exception that no hook sees (KeyboardInterrupt).
                del calls[depth:]
                if node is not None and not thread.is_forward and isinstance(node, BackwardCFunction):
                    self._tag(thread, args, output)
                return

    def _tag(self, thread: Thread, args: Any, output: Any) -> None:
        """Write to nodes that they were made on this thread, which has no forward pass of its own."""
        seen: set[Any] = {leaf.grad_fn for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        pending: list[Any] = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        while pending:
            node = pending.pop()
            if node is None or node in seen or self in node.metadata:
                continue
            seen.add(node)
            if node._sequence_nr() in thread.numbers:
                node.metadata[self] = thread
                pending += [after for after, _ in node.next_functions]

    def _step_begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        thread = self._thread()
        self._stepped.begin(thread.stepping, optimizer, args, kwargs, len(thread.calls))

    def _step_ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepped.end(self._thread().stepping, optimizer)
