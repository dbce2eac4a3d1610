"""Every tensor that the package makes says its dtype and its device: torch.set_default_dtype and set_default_device
belong to the user's model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[1] / "src" / "halfstep"

WORKLOADS = SOURCE / "workloads"
"""The demonstrations are exempt: they are plain PyTorch scripts, as a user writes them."""

FACTORIES = frozenset(
    {
        "arange",
        "as_tensor",
        "asarray",
        "bartlett_window",
        "blackman_window",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "frombuffer",
        "full",
        "hamming_window",
        "hann_window",
        "kaiser_window",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "range",
        "scalar_tensor",
        "sparse_coo_tensor",
        "tensor",
        "tril_indices",
        "triu_indices",
        "zeros",
    }
)
"""The functions of torch that make a tensor of the default dtype or on the default device where they are not told."""

WITHOUT_DEVICE = frozenset({"frombuffer"})
"""Those that take no device: their tensor lies in the memory that they are given."""


def unstated(source: str) -> list[tuple[int, str]]:
    """The calls in `source` that leave a tensor's dtype or device to the defaults: line and what is left open."""
    tree = ast.parse(source)
    named = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                pass
            case ast.Name(id=name) if name in named:
                pass
            case _:
                continue
        stated = {keyword.arg for keyword in node.keywords}
        if name in {"Tensor", "FloatTensor"}:
            found.append((node.lineno, f"torch.{name}(…) takes neither: torch.tensor(…)"))
        if name not in FACTORIES:
            continue
        asked = {"dtype"} if name in WITHOUT_DEVICE else {"dtype", "device"}
        if left := sorted(asked - stated):
            found.append((node.lineno, f"torch.{name}(…) without {' and '.join(left)}"))
    return found


def test_every_factory_call_states_dtype_and_device() -> None:
    files = [path for path in sorted(SOURCE.rglob("*.py")) if WORKLOADS not in path.parents]
    found = [
        f"{path.relative_to(SOURCE.parent)}:{line}: {what}"
        for path in files
        for line, what in unstated(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "call",
    [
        "torch.zeros(3)",
        "torch.zeros(3, dtype=torch.float32)",
        "torch.full((2,), 1.0, device='cpu')",
        "torch.Tensor([1.0])",
        "torch.frombuffer(b'1234')",
    ],
)
def test_a_call_that_leaves_one_open_is_found(call: str) -> None:
    assert [line for line, _ in unstated(f"import torch\n{call}\n")] == [2]


def test_a_factory_imported_by_name_is_found() -> None:
    assert unstated("from torch import zeros\nzeros(3)\n") == [(2, "torch.zeros(…) without device and dtype")]


def test_deliberate_inheritance_and_stated_calls_are_not() -> None:
    stated = "torch.zeros_like(x)\nx.new_zeros(3)\ntorch.ones(1, dtype=x.dtype, device='cpu')\n"
    assert not unstated(f"import torch\n{stated}")


def test_the_factories_are_torchs() -> None:
    assert all(hasattr(torch, name) for name in FACTORIES)
