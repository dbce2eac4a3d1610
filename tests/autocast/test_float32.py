"""PyTorch's switches for FP32 products: held while a policy is in effect, never raising, and put back exactly."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from halfstep.autocast import Float32Switches, float32_precision
from halfstep.autocast.float32 import hold, is_held
from halfstep.engine import MixedPrecision
from halfstep.policy import parse

matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
OLDER = {
    "matmul": lambda: matmul.allow_tf32,
    "cudnn": lambda: cudnn.allow_tf32,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
}
KERNELS = list(itertools.product(("cuda", "mkldnn"), ("matmul", "conv", "rnn")))
ABOVE = [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]


def put(owner: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


#: What scripts and libraries write, one by one and mixed; a name says what.
WRITTEN: dict[str, list[Callable[[], None]]] = {
    "nothing": [],
    "high": [lambda: torch.set_float32_matmul_precision("high")],
    "medium": [lambda: torch.set_float32_matmul_precision("medium")],
    "older allow": [put(matmul, "allow_tf32", True), put(cudnn, "allow_tf32", True)],
    "older forbid": [put(matmul, "allow_tf32", False), put(cudnn, "allow_tf32", False)],
    "newer matmul": [put(matmul, "fp32_precision", "tf32")],
    "newer conv": [put(cudnn.conv, "fp32_precision", "ieee")],
    "newer rnn": [put(cudnn.rnn, "fp32_precision", "none")],
    "newer cudnn": [put(cudnn, "fp32_precision", "tf32")],
    "newer all tf32": [put(torch.backends, "fp32_precision", "tf32")],
    "newer all ieee": [put(torch.backends, "fp32_precision", "ieee")],
    "newer all bf16": [put(torch.backends, "fp32_precision", "bf16")],
    "newer on a CPU": [put(mkldnn.matmul, "fp32_precision", "bf16"), put(mkldnn.conv, "fp32_precision", "bf16")],
    "high, then newer": [
        lambda: torch.set_float32_matmul_precision("high"),
        put(matmul, "fp32_precision", "ieee"),
        put(cudnn.conv, "fp32_precision", "ieee"),
        put(torch.backends, "fp32_precision", "tf32"),
    ],
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = Float32Switches.read()
    yield
    before.put_back()


@pytest.fixture(params=WRITTEN)
def written(request: pytest.FixtureRequest) -> str:
    for write in WRITTEN[request.param]:
        write()
    return str(request.param)


def seen() -> dict[str, object]:
    """What anyone can read, errors included."""
    found: dict[str, object] = {f"{b}.{o}": torch._C._get_fp32_precision_getter(b, o) for b, o in [*KERNELS, *ABOVE]}
    for name, read in OLDER.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = type(error)
    return found


def shown_from_above() -> list[dict[str, object]]:
    """Which switches follow those above them: what they come to when these change."""
    found = []
    for value in ("none", "ieee", "tf32"):
        for backend, op in ABOVE:
            before = torch._C._get_fp32_precision_getter(backend, op)
            torch._C._set_fp32_precision_setter(backend, op, value)
            found.append(seen())
            torch._C._set_fp32_precision_setter(backend, op, before if backend == "generic" else "none")
    return found


def test_reading_changes_nothing(written: str) -> None:
    before = seen()
    first = Float32Switches.read()
    assert seen() == before
    assert Float32Switches.read() == first


@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_a_policy_decides_while_it_is_in_effect_whatever_was_written(written: str, name: str) -> None:
    before, switches = seen(), Float32Switches.read()
    with float32_precision(parse(name)):
        assert all((seen()[f"cuda.{op}"] == "tf32") == (name == "tf32") for op in ("matmul", "conv", "rnn"))
        on_cpu = {seen()[f"mkldnn.{op}"] for op in ("matmul", "conv", "rnn")}
        assert on_cpu <= {"ieee", "none", *(["tf32"] if name == "tf32" else [])}
        assert is_held("tf32" if name == "tf32" else "ieee")
        assert RuntimeError not in seen().values(), "compilers and torch.backends.cudnn.flags read the older ones"
        with cudnn.flags(enabled=True, allow_tf32=name == "tf32"):
            assert (seen()["cuda.conv"] == "tf32") == (name == "tf32")
    assert seen() == before
    after = Float32Switches.read()
    defaults = {key: "tf32" for key, value in switches.precisions.items() if value is None}
    assert after.precisions in (switches.precisions, switches.precisions | defaults)
    assert (after.matmul, after.cudnn) == (switches.matmul, switches.cudnn)


def test_what_a_switch_takes_from_above_it_takes_afterwards_too() -> None:
    for op in ("conv", "rnn"):  # their default is one that cannot be set again
        torch._C._set_fp32_precision_setter("cuda", op, "none")
    before = shown_from_above()
    with float32_precision(parse("tf32")):
        pass
    assert shown_from_above() == before


@pytest.mark.parametrize("text", ["bf16-mixed", "fp16-mixed", "bf16-master"])
def test_a_policy_that_keeps_nothing_in_fp32_leaves_the_settings(written: str, text: str) -> None:
    before = seen()
    with float32_precision(parse(text)):
        assert seen() == before


@pytest.mark.parametrize("text", ["bf16-mixed:keep_fp32=head", "fp16-mixed:fp32_ops=conv2d"])
def test_what_a_16_bit_policy_keeps_in_fp32_is_fp32(written: str, text: str) -> None:
    with float32_precision(parse(text)):
        assert is_held("ieee")


def test_an_error_inside_puts_the_switches_back(written: str) -> None:
    before = seen()
    with contextlib.suppress(LookupError), float32_precision(parse("fp32")):
        raise LookupError
    assert seen() == before


def ones_and_more(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices and their product, exact in FP32 in any order; TF32 and BF16 lose the first one's last bit."""
    shape = (256, 256)
    first, second = torch.full(shape, 1 + 2.0**-12, device=device), torch.ones(shape, device=device)
    return first, second, torch.full(shape, 256 * (1 + 2.0**-12), device=device)


def test_on_a_cpu_fp32_is_fp32_in_forward_and_backward() -> None:
    a, b, exact = ones_and_more()
    torch.set_float32_matmul_precision("medium")
    if torch.equal(a @ b, exact):
        pytest.skip("this CPU has no BF16 products to take for FP32 ones")
    model = torch.nn.Linear(256, 256, bias=False)
    torch.nn.init.constant_(model.weight, 1 + 2.0**-12)
    mp = MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp32")
    with mp.autocast():
        y = model(b)
    mp.backward((y * (1 + 2.0**-12)).sum())
    assert torch.equal(y, exact)
    assert model.weight.grad is not None and torch.equal(model.weight.grad, exact)
    assert torch.get_float32_matmul_precision() == "medium"


def test_no_switch_warns() -> None:
    """PyTorch warns once in a process, so in one of its own."""
    code = """
import torch
from halfstep.autocast import Float32Switches, float32_precision
from halfstep.policy import parse
torch.backends.cuda.matmul.fp32_precision = "tf32"
for name in ("fp32", "tf32"):
    with float32_precision(parse(name)):
        pass
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_products_and_convolutions_are_fp32_whatever_was_written(written: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a device that has TF32")
    a, b, exact = ones_and_more("cuda")
    image, kernel = a.reshape(1, 256, 16, 16), b.reshape(256, 256, 1, 1)
    with float32_precision(parse("fp32")):
        assert torch.equal(a @ b, exact)
        assert torch.equal(torch.nn.functional.conv2d(image, kernel), exact.reshape(1, 256, 16, 16))
    with float32_precision(parse("tf32")):
        assert not torch.equal(a @ b, exact)


def test_holding_twice_is_holding_once() -> None:
    hold("ieee")
    first = Float32Switches.read()
    hold("ieee")
    assert Float32Switches.read() == first and is_held("ieee") and not is_held("tf32")
