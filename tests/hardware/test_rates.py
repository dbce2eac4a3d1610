"""Rates of products: what the cache keeps, for whom, and that it may be missing or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.hardware import product_rates, rates


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of a process that has measured nothing."""
    monkeypatch.setattr(rates.platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "new")
    rates._rates.cache_clear()
    yield tmp_path / "new" / "rates.json"  # type: ignore[misc]  # a generator, as pytest wants it
    rates._rates.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each measurement; each finds other rates."""
    calls: list[int] = []

    def measure() -> dict[str, float | None]:
        calls.append(1)
        return {"bf16": 1.0 + len(calls), "fp16": None}

    monkeypatch.setattr(rates, "_measured_apart", measure)
    return calls


def test_rates_are_positive_and_a_format_without_products_has_none() -> None:
    found = rates.measure()
    assert found.keys() == {"bf16", "fp16"}
    assert all(rate is None or rate > 0 for rate in found.values())


def test_it_is_measured_once_for_all_processes_and_again_when_asked(cache: Path, measured: list[int]) -> None:
    assert product_rates() == product_rates() == {"bf16": 2.0, "fp16": None}
    rates._rates.cache_clear()  # as another process
    assert product_rates() == {"bf16": 2.0, "fp16": None} and len(measured) == 1
    assert product_rates(anew=True) == product_rates() == {"bf16": 3.0, "fp16": None}
    assert list(json.loads(cache.read_text()).values()) == [{"bf16": 3.0, "fp16": None}]
    assert [file.name for file in cache.parent.iterdir()] == ["rates.json"]


@pytest.mark.parametrize("limit", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"])
def test_what_changes_the_kernels_is_measured_apart(
    cache: Path, measured: list[int], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = product_rates()
    with monkeypatch.context() as patch:
        patch.setenv(limit, "something else")
        assert product_rates() != first
    assert product_rates() == first and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"KEY": 1}', '{"KEY": {"bf16": 2.0}}', '{"KEY": {"bf16": "2", "fp16": -1.0}}']
)
def test_a_damaged_cache_is_measured_over(cache: Path, measured: list[int], content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", rates._key()))
    assert product_rates() == {"bf16": 2.0, "fp16": None}
    assert json.loads(cache.read_text())[rates._key()] == {"bf16": 2.0, "fp16": None}


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path, measured: list[int]) -> None:
    cache.parent.write_text("a file where the folder would be")
    assert product_rates() == {"bf16": 2.0, "fp16": None}


def test_a_script_is_left_without_threads_of_ours(cache: Path) -> None:
    """A forked child of a process whose OpenMP threads have run waits for them for ever."""
    code = """
import os, sys
import torch
from halfstep import hardware
hardware.product_rates(anew=True)
if (child := os.fork()) == 0:
    x = torch.ones(600, 600)
    (x @ x).sum().item()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)


def test_without_another_process_it_is_measured_in_this_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(rates, "measure", lambda: {"bf16": 7.0, "fp16": None})
    assert product_rates() == {"bf16": 7.0, "fp16": None}


def test_neither_modes_nor_autocast_nor_generators_notice() -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function: object, types: object, args: object = (), kwargs: object = None) -> None:
            raise AssertionError(f"seen: {function}")

    state = torch.get_rng_state()
    with Refusing(), torch.autocast("cpu", torch.bfloat16):
        rates.measure()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_library_held_to_avx2_makes_no_16_bit_format_native(tmp_path: Path) -> None:
    """As on most laptops: whatever this CPU has, `auto` is FP32 there, and says why with the number."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    code = "import halfstep; from halfstep.policy import choose; print(*choose(halfstep.detect('cpu')))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **limits, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    if sys.platform == "linux" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        assert run.stdout.startswith("fp32 no 16-bit format is known to be faster here") and "measured" in run.stdout
