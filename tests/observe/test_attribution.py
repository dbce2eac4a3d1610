"""Every op gets its module, line and phase, forward and backward, whatever autograd is made to do.

The oracle is slow and independent: after every PyTorch function it walks the graph of the result and tags new nodes
with the innermost ``forward`` frame of a module and with a traceback; an op of backward then belongs to what the tag
of the evaluated node says.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from halfstep.observe.attribution import Attribution
from halfstep.observe.place import Place

TORCH = str(Path(torch.__file__).parent)
Seen = list[tuple[Place, list[int]]]


class Places(TorchDispatchMode):
    """Asks for the place of every op; keeps it with the sizes of all tensors that go in."""

    def __init__(self, attribution: Attribution) -> None:
        super().__init__()
        self.attribution = attribution
        self.seen: Seen = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self.attribution.place(func, args)
        self.seen.append((place, [n for leaf in tree_leaves(args) if isinstance(leaf, Tensor) for n in leaf.shape]))
        return func(*args, **(kwargs or {}))


class Oracle(TorchFunctionMode):
    """Tags every node with the module and line that were running when it appeared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}

    def here(self, below_engine: bool = False) -> tuple[str, int] | None:
        """Module and line that run now; `below_engine`: None unless a module runs inside of the backward pass."""
        module, frame = "", sys._getframe(1)
        while frame is not None:  # type: ignore[redundant-expr]
            owner = frame.f_locals.get("self")
            if frame.f_code.co_name == "forward" and isinstance(owner, nn.Module):
                module = self.names[id(owner)]
                break
            if below_engine and frame.f_code.co_name == "_engine_run_backward":
                return None
            frame = frame.f_back  # type: ignore[assignment]
        skipped = ("__torch_function__", "__torch_dispatch__", "here")
        lines = [s.lineno for s in traceback.extract_stack() if TORCH not in s.filename and s.name not in skipped]
        return module, int(lines[-1] or 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        pending: list[Any] = [leaf.grad_fn for leaf in tree_leaves((result, args)) if isinstance(leaf, Tensor)]
        while pending:
            node = pending.pop()
            if node is not None and "oracle" not in node.metadata:
                node.metadata["oracle"] = self.here()
                pending += [after for after, _ in node.next_functions]
        return result


class Compared(TorchDispatchMode):
    """The place and what the oracle says of it, op by op."""

    def __init__(self, attribution: Attribution, oracle: Oracle, model: nn.Module) -> None:
        super().__init__()
        self.attribution, self.oracle, self.model = attribution, oracle, model
        self.pairs: list[tuple[Place, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self.attribution.place(func, args)
        node: Any = torch._C._current_autograd_node()
        again = None if node is None else self.oracle.here(below_engine=True)
        expected: tuple[Any, ...]
        if node is None:
            expected = ("forward", *(self.oracle.here() or ()))
        elif again is not None:
            expected = ("forward", *again)
        elif "AccumulateGrad" in node.name():
            names = [name for name, p in self.model.named_parameters() if p is node.variable]
            if names:
                expected = ("backward", names[0].rpartition(".")[0] or type(self.model).__name__, None)
            else:
                # The gradient of an input: said of the op that made it.
                expected = next(said for _, said in reversed(self.pairs) if said[2] is not None)
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            # The tag came with the first function after it; its own line is that of its first op.
            expected = ("backward", node.metadata["oracle"][0], place.line)
        else:
            expected = ("backward", *node.metadata["oracle"])
        self.pairs.append((place, expected))
        return func(*args, **(kwargs or {}))


def back(loss: Tensor) -> None:
    """``loss.backward()``, which is a PyTorch function: the oracle would be off while it runs."""
    torch.autograd.graph._engine_run_backward(  # type: ignore[no-untyped-call]
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def compare(model: nn.Module, run: Callable[[], Any]) -> list[Place]:
    """Run under attribution and oracle; all places, which must be the same."""
    attribution, oracle = Attribution(), Oracle(model)
    with attribution, oracle, Compared(attribution, oracle, model) as compared:
        run()
    assert attribution.failures == []
    assert attribution.unknown == 0
    assert len(compared.pairs) > 10
    for place, expected in compared.pairs:
        assert (place.phase, place.module, place.line) == expected, place
        assert place.parameter is not None or place.line is not None, place
    assert {place.phase for place, _ in compared.pairs} >= {"forward", "backward"}
    return [place for place, _ in compared.pairs]


class Double(torch.autograd.Function):
    """y = 2 x, with ops of its own in forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.mul(x, 1.5) + torch.mul(x, 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 + x * 0


class Block(nn.Module):
    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(6)
        self.lin = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(self.norm(x))
        if self.kind == "function":
            h = Double.apply(h)  # type: ignore[no-untyped-call]
        if self.kind == "in-place":
            h = h.clone()
            h[1:3] = h[1:3] * 3
            h[0].mul_(2)
            h = self.norm(h)
        return x + torch.tanh(h) * self.gain


class Net(nn.Module):
    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList([Block(kind), Block(kind), Block(kind)])
        self.scale = nn.Parameter(torch.ones(()))
        if kind == "shared":
            self.blocks[2].lin = self.blocks[0].lin
        if kind == "hooked":
            self.blocks[1].register_full_backward_hook(lambda module, into, out: (into[0] * 1.0,))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.kind in ("reentrant", "non-reentrant"):
                x = checkpoint(block, x, use_reentrant=self.kind == "reentrant")
            else:
                x = block(x)
        return x.sum(1) * self.scale


KINDS = ["plain", "reentrant", "non-reentrant", "function", "in-place", "shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_op_is_where_the_oracle_says(kind: str) -> None:
    model = Net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(2):
            x = torch.randn(4, 6, requires_grad=True)
            for _ in range(2):  # two graphs at once
                loss = model(x).square().mean()
                other = model(x).abs().mean()
            back(other * 2)
            back(loss)
            optimizer.zero_grad()

    places = compare(model, run)
    modules = {place.module for place in places if place.phase == "backward"}
    linear = {f"blocks.{i}.lin" for i in (range(2) if kind == "shared" else range(3))}
    assert modules == {"", "Net", *linear, *(f"blocks.{i}{part}" for i in range(3) for part in ("", ".norm"))}


def test_backward_inside_of_forward_is_backward() -> None:
    """Models of forces differentiate their energy in their own forward pass."""

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = Block()

        def forward(self, x: Tensor) -> Tensor:
            (force,) = torch.autograd.grad(self.energy(x).sum(), x)
            return force * 2.0 + self.energy(x)

    model = Forces()
    compare(model, lambda: back(model(torch.randn(4, 6, requires_grad=True)).sum()))


class Wide(nn.Module):
    """Layers known by their sizes: layer i maps sizes[i] to sizes[i + 1]."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        sizes = sizes or (3, 5, 7, 11)
        self.layers = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def check_sizes(model: nn.Module, seen: Seen, batch: int) -> int:
    """Matrix products must be in the layer that their sizes tell; how many there were."""
    products = [(place, set(sizes) - {batch}) for place, sizes in seen if place.op in ("mm", "addmm")]
    for place, sizes in products:
        assert sizes == set(model.get_submodule(place.module).weight.shape), (place, sizes)  # type: ignore[union-attr]
    return len(products)


def test_double_backward_belongs_to_the_layer_whose_gradient_it_takes() -> None:
    model = Wide()
    x = torch.randn(2, 3, requires_grad=True)
    with Attribution() as attribution, Places(attribution) as places:
        for _ in range(2):
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            penalty = (gradient.norm() - 1).square()
            penalty.backward()
    assert (attribution.failures, attribution.unknown) == ([], 0)
    assert check_sizes(model, places.seen, 2) > 2 * 3 * 5
    assert {place.phase for place, _ in places.seen if place.op == "mm"} == {"backward"}
    assert all(place.line or place.parameter for place, _ in places.seen)


class Steps(nn.Module):
    """Checkpoints a function that is no module: its own ops around a layer."""

    def __init__(self, width: int, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.lin = nn.Linear(width, width + 2)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.lin(torch.relu(x).sin())  # type: ignore[no-any-return]

        return checkpoint(inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_keeps_its_module(reentrant: bool) -> None:
    model = nn.Sequential(Steps(5, reentrant), Steps(7, reentrant), Steps(9, reentrant))
    with Attribution() as attribution, Places(attribution) as places:
        model(torch.randn(2, 5, requires_grad=True)).sum().backward()
    assert (attribution.failures, attribution.unknown) == ([], 0)
    relus = [(place.module, place.phase, sizes) for place, sizes in places.seen if place.op == "relu"]
    assert len(relus) == 6  # forward and again
    assert {(module, phase, sizes[1]) for module, phase, sizes in relus} == {
        (str(i), "forward", 5 + 2 * i) for i in range(3)
    }
    cosines = {(place.module, place.phase, sizes[1]) for place, sizes in places.seen if place.op == "cos"}
    assert cosines == {(str(i), "backward", 5 + 2 * i) for i in range(3)}
    lines = {place.line for place, _ in places.seen if place.op in ("relu", "sin")}
    assert lines == {Steps.forward.__code__.co_firstlineno + 2}


def on_new_thread(run: Callable[[], Any]) -> Any:
    """Run on a thread of its own, whose count of autograd nodes starts from 0."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_on_a_thread_that_counts_its_own_nodes(reentrant: bool) -> None:
    """As on an accelerator: recomputation numbers its nodes from 0 there, and forward has the same numbers."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = Wide(), Wide(11, 13, 17, 19), Wide(19, 23, 29, 31)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.again, self.first(x), use_reentrant=reentrant))  # type: ignore[no-any-return]

    model = Three()
    with Attribution() as attribution:

        def forward() -> tuple[Tensor, Seen]:
            with Places(attribution) as places:
                return model(torch.randn(2, 3, requires_grad=True)), places.seen

        def backward() -> Seen:
            with Places(attribution) as places:
                torch.autograd.backward([out], [seed])
            return places.seen

        for _ in range(2):
            out, seen = on_new_thread(forward)
            seed = torch.ones_like(out)
            assert check_sizes(model, seen, 2) == 9
            there = on_new_thread(backward)
            # Two products to a layer; none for the input of the first; and three again.
            assert check_sizes(model, there, 2) == 2 * 9 + 3
            assert {place.op for place, _ in there if place.phase == "forward"} >= {"addmm", "tanh"}
    assert (attribution.failures, attribution.unknown) == ([], 0)


class Recomputes(nn.Module):
    """Checkpoints a function of its own behind ops that use up the numbers of its nodes."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.before, self.inside, self.behind = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.inside(x)) * 2.0

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.softmax(x, -1)
        x = checkpoint(self.inner, self.before(x), use_reentrant=self.reentrant)
        return self.behind(x)  # type: ignore[no-any-return]


class Contains(nn.Module):
    """Checkpoints one of PyTorch's containers: no line of a script stands inside of it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.container = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Sequential(nn.Linear(6, 6)))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        x = checkpoint(self.container, x, use_reentrant=self.reentrant)
        return checkpoint(torch.tanh, x, use_reentrant=self.reentrant).sum()


def places_on(model: nn.Module, threads: bool) -> Seen:
    """Places of two steps; `threads`: forward on one thread, backward on another that has only the device's frames."""
    seen: Seen = []

    def observed(attribution: Attribution, work: Callable[[], Any]) -> Any:
        with Places(attribution) as places:
            result = work()
        seen.extend(places.seen)
        return result

    run = on_new_thread if threads else lambda work: work()
    with Attribution() as attribution:
        for _ in range(2):
            out = run(lambda: observed(attribution, lambda: model(torch.randn(4, 6, requires_grad=True))))
            backward = functools.partial(torch.autograd.backward, [out], [torch.ones_like(out)])
            run(functools.partial(observed, attribution, backward))
    assert (attribution.failures, attribution.unknown) == ([], 0)
    return seen


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_method_has_its_own_lines_in_backward(reentrant: bool, threads: bool) -> None:
    seen = places_on(Recomputes(reentrant), threads)
    line = Recomputes.inner.__code__.co_firstlineno + 1
    of_gelu = {(place.module, place.phase, place.line) for place, _ in seen if place.op == "gelu_backward"}
    assert of_gelu == {("Recomputes", "backward", line)}
    products = {(place.phase, place.module) for place, _ in seen if place.op == "mul"}
    assert products == {("forward", "Recomputes"), ("backward", "Recomputes")}
    assert {place.line for place, _ in seen if place.op == "mul"} == {line}
    lines = {place.line for place, _ in seen if place.module == "inside" and place.parameter is None}
    assert lines == {line}


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_containers_recompute_is_on_the_line_that_called_them(reentrant: bool, threads: bool) -> None:
    seen = places_on(Contains(reentrant), threads)
    start = Contains.forward.__code__.co_firstlineno
    inside = [place for place, _ in seen if place.module.startswith("container") and place.parameter is None]
    assert {place.module for place in inside} == {f"container.{part}" for part in ("0", "1", "2", "3.0")}
    assert {place.line for place in inside} == {start + 2}
    recomputed = [place.op for place in inside if place.phase == "forward"]
    assert recomputed.count("gelu") == 2 * 2
    tanh = {(place.phase, place.line, place.module) for place, _ in seen if place.op == "tanh"}
    assert tanh == {("forward", start + 3, "Contains")}
    assert {(p.phase, p.line) for p, _ in seen if p.op == "tanh_backward"} == {("backward", start + 3)}


def test_an_exception_in_forward_leaves_no_module_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    broken, model = nn.Sequential(nn.Linear(3, 3), Fails()), nn.Sequential(nn.Linear(3, 3))
    with Attribution() as attribution, Places(attribution) as places:
        with pytest.raises(ZeroDivisionError):
            broken(torch.ones(2, 3))
        torch.ones(2).mul(3)
        model(torch.ones(2, 3))
    names = [(place.op, place.module) for place, _ in places.seen if place.op in ("mul", "addmm")]
    assert names == [("addmm", "0"), ("mul", ""), ("addmm", "0")]


def test_modules_that_nobody_owns_and_wrappers() -> None:
    free = [nn.Linear(3, 3)]

    class Uses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return free[0](x)  # type: ignore[no-any-return]

    class Grows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "late"):
                self.late = nn.Linear(3, 3)
            return self.late(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Uses(), nn.DataParallel(Grows()))
    with Attribution() as attribution, Places(attribution) as places:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
    seen = [place.module for place, _ in places.seen if place.op == "addmm"]
    assert seen == ["0.Linear", "1.late"] * 2
    assert attribution.parameter_name(model[1].module.late.weight) == "1.late.weight"
    assert attribution.roots == (model,)


def test_a_compiled_module_has_the_same_places() -> None:
    model = Wide()
    # aot_eager: no C++ compiler is needed, and a dispatch mode makes it run eagerly anyway.
    for called in (model, torch.compile(model, backend="aot_eager")):
        with Attribution() as attribution, Places(attribution) as places:
            called(torch.randn(2, 3)).sum().backward()
        assert attribution.failures == []
        assert check_sizes(model, places.seen, 2) == 3 + 5


def test_without_a_dispatch_mode_a_compiled_module_runs_as_ever() -> None:
    model, x = Wide(), torch.randn(2, 3)
    compiled = torch.compile(model, backend="eager")
    with Attribution() as attribution:
        assert torch.equal(compiled(x), model(x))
    assert attribution.failures == []


def test_two_processes_of_ddp_see_the_names_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("attribution_ranks.py"))]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    printed = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for lines in printed:
        result = json.loads(lines.splitlines()[-1])
        assert (result["unknown"], result["failures"]) == (0, [])
        assert result["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        backward = [entry for entry in result["seen"] if entry[1] == "backward"]
        assert {module for op, _, module, _ in backward if op == "mm"} == {"0", "2"}
        reduced = [entry for entry in result["seen"] if entry[0] == "allreduce_"]
        assert reduced
        assert all(entry[1] == "backward" and entry[3] in result["names"] for entry in reduced), reduced


@pytest.mark.parametrize("foreach", [True, False])
def test_optimizers_are_a_phase_and_name_parameters(foreach: bool) -> None:
    model, extra = Wide(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([*model.parameters(), extra], foreach=foreach)
    with Attribution() as attribution, Places(attribution) as places:
        for step in (1, 2):
            assert attribution.step == step
            (model(torch.randn(2, 3)).sum() + extra.sum()).backward()
            optimizer.step()
    assert attribution.optimizers == (optimizer,)
    assert attribution.parameter_name(extra) == "group0[6]"
    assert attribution.parameter_name(model.layers[1].bias) == "layers.1.bias"
    assert attribution.parameter_name(torch.ones(2)) is None
    updates = [place for place, _ in places.seen if place.op.endswith("addcdiv_")]
    assert updates
    assert {place.phase for place in updates} == {"optimizer"}
    if not foreach:
        assert [place.parameter for place in updates[:7]] == [
            *(f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")),
            "group0[6]",
        ]
        assert updates[2].module == "layers.1"
        assert updates[2].module_type == "Linear"
        moments = [place.parameter for place, _ in places.seen if place.op == "lerp_"]
        assert moments[-7:] == [place.parameter for place in updates[:7]]
    gradients = {place.parameter for place, _ in places.seen if place.phase == "backward" and place.parameter}
    assert gradients == {f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")} | {"group0[6]"}


def test_a_closure_runs_the_model_not_the_optimizer() -> None:
    model = Wide()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    with Attribution() as attribution, Places(attribution) as places:
        optimizer.step(closure)
    phases = {op: {p.phase for p, _ in places.seen if p.op == op} for op in ("pow", "addmm", "mm", "dot", "cat")}
    assert phases == {
        "pow": {"forward", "backward"},
        "addmm": {"forward"},
        "mm": {"backward"},
        "dot": {"optimizer"},
        "cat": {"optimizer"},
    }
    assert attribution.step == 2


def test_a_module_that_an_optimizer_calls_is_forward() -> None:
    model = Wide()

    class Looks(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return model(torch.ones(2, 3)).mul(2)

    with Attribution() as attribution, Places(attribution) as places:
        Looks(model.parameters(), lr=0.1).step()
    phases = [(place.op, place.phase) for place, _ in places.seen if place.op in ("addmm", "mul")]
    assert phases == [("addmm", "forward")] * 3 + [("mul", "optimizer")]


def test_a_step_that_raises_does_not_count_and_does_not_last() -> None:
    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError

    model = Wide()
    good, bad = torch.optim.SGD(model.parameters(), lr=0.1), Raises(model.parameters(), lr=0.1)
    with Attribution() as attribution:
        with pytest.raises(ArithmeticError):
            bad.step()
        assert attribution.step == 1
        good.step()
    assert attribution.step == 2


def test_two_networks_keep_their_parameters_apart() -> None:
    first, second = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    with Attribution() as attribution:
        first(torch.ones(1, 3))
        second(torch.ones(1, 3))
    assert attribution.parameter_name(first[0].weight) == "0.weight"
    assert attribution.parameter_name(second[0].weight) == "Sequential.0.weight"


def test_entering_twice_is_fine_and_leaving_removes_every_hook() -> None:
    def count() -> list[int]:
        found = [
            hooks._global_forward_hooks,
            hooks._global_forward_pre_hooks,
            hooks._global_forward_hooks_always_called,
        ]
        steps = [optimizer_hooks._global_optimizer_pre_hooks, optimizer_hooks._global_optimizer_post_hooks]
        return [len(each) for each in (*found, *steps)]

    before = count()
    attribution = Attribution()
    with attribution:
        inside = count()
        with attribution:
            assert count() == inside
        assert count() == inside
    assert [b - a for a, b in zip(before, inside, strict=True)] == [1] * 5
    assert count() == before


def test_a_graph_from_before_is_unknown_and_only_that() -> None:
    model = Wide()
    loss = model(torch.ones(2, 3)).sum()
    with Attribution() as attribution, Places(attribution) as places:
        loss.backward()
    assert attribution.unknown > 10
    assert attribution.failures == []
    assert {place.phase for place, _ in places.seen} == {"forward", "backward"}  # forward: the seed of ones


def test_failures_inside_never_reach_the_run() -> None:
    attribution = Attribution()
    with attribution:
        attribution._outside = None  # type: ignore[assignment]
        for _ in range(3):
            assert attribution.place(torch.ops.aten.mm.default) == Place("mm")
    assert len(attribution.failures) == 1
    assert "AttributeError" in attribution.failures[0]


def test_built_in_scripts_are_scripts() -> None:
    from halfstep.observe import source_line
    from halfstep.workloads import gpt

    assert source_line._is_script(gpt.__file__)
    assert not source_line._is_script(source_line.__file__)
    assert not source_line._is_script(torch.nn.functional.__file__)
    assert source_line.shown(str(Path.cwd() / "a" / "b.py")) == str(Path("a", "b.py"))
    assert source_line.shown(str(Path.cwd().parent / "b.py")) == str(Path.cwd().parent / "b.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [Recomputes, Contains])
@pytest.mark.parametrize("reentrant", [True, False])
def test_ops_on_a_devices_thread_have_the_places_of_the_cpu(kind: type[nn.Module], reentrant: bool) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = kind(reentrant).to(device)
        with Attribution() as attribution, Places(attribution) as places:
            for _ in range(2):
                model(torch.randn(4, 6, device=device, requires_grad=True)).sum().backward()
        assert (attribution.failures, attribution.unknown) == ([], 0)
        ops = ("mm", "addmm", "gelu", "gelu_backward", "tanh", "tanh_backward", "sin", "cos", "_softmax")
        found.append({(p.op, p.phase, p.module, p.line) for p, _ in places.seen if p.op in ops})
    assert found[0] == found[1]
