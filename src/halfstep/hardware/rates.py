"""How fast this CPU multiplies matrices in 16 bits, beside FP32: timed in less than a second, and remembered.

A CPU's features do not say it. AVX512_FP16 is there and runs at FP32's rate; a library that is told to stay with AVX2,
or an older one, does not use what is there. So a product is timed in each format, in turns, and the ratio of the
shortest times taken: what disturbs a machine only ever makes a run longer.

That happens in a process of its own, this file as a program: products of ours before a script's first line would start
its threads, and a script that forks afterwards hangs where it would not have. The result is kept in the user's cache
folder under all that it depends on, and the process remembers it. A cache that cannot be read or written is no error:
the next process measures again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: By format name, bf16 and fp16: its products per second as a multiple of FP32's; None: PyTorch has none here.
Rates = Mapping[str, float | None]

_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Rows and columns: 0.3 GFLOP, some milliseconds in FP32, and enough for a kernel to show what it can.
_SIZE = 512
#: Seconds of turns: on a machine that others use too, some of a few dozen turns are undisturbed.
_ENOUGH = 0.3
#: A format that is so many times slower than FP32 in one run is not run again: its rate is clear.
_HOPELESS = 5.0


def product_rates(anew: bool = False) -> Rates:
    """The rates of a core of this CPU.

    Args:
        anew: measure, whatever the cache knows, and remember that.
    """
    key = _key()
    if anew:
        _rates.cache_clear()
        _forget(key)
    return _rates(key)


@functools.cache
def _rates(key: str) -> Rates:
    known = _whole(_read().get(key))
    if known is not None:
        return known
    rates = _measured_apart() or measure()
    _write({**_read(), key: rates})
    return rates


def _measured_apart() -> Rates | None:
    """What `measure` finds in another process; None where none can be had."""
    command = [sys.executable, "-P", __file__]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
        return _whole(json.loads(run.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def measure() -> dict[str, float | None]:
    """Time a product in every format, in turns, in this process; about half a second."""
    # Whatever watches, fakes or casts the operations of a script has no business with these.
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.inference_mode():
        runs: dict[str, Callable[[], Tensor]] = {"fp32": _product(torch.float32)}
        rates: dict[str, float | None] = {}
        for name, dtype in _FORMATS.items():
            try:
                run = _product(dtype)
                run()
            except RuntimeError:
                rates[name] = None
            else:
                runs[name] = run
        runs["fp32"]()
        best = {name: _seconds(run) for name, run in runs.items()}
        slow = {name for name, seconds in best.items() if seconds > _HOPELESS * best["fp32"]}
        end = time.perf_counter() + _ENOUGH
        while time.perf_counter() < end:
            for name in runs.keys() - slow:
                best[name] = min(best[name], _seconds(runs[name]))
    return {name: round(best["fp32"] / best[name], 3) if name in best else None for name in _FORMATS}


def _product(dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.full((_SIZE, _SIZE), 0.5, dtype=dtype, device="cpu")
    return lambda: torch.nn.functional.linear(x, x)


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# The cache ------------------------------------------------------------------------------------------------------------


def _key() -> str:
    """A name for all that a rate depends on."""
    limits = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
    facts = [
        torch.__version__,
        sorted(f"{name}={value}" for name, value in torch.cpu.get_capabilities().items()),
        [os.environ.get(name) for name in limits],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _file() -> Path:
    return platformdirs.user_cache_path("halfstep", appauthor=False) / "rates.json"


def _read() -> dict[str, object]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError, RuntimeError):  # none yet, damaged, or a user without a home
        return {}
    return found if isinstance(found, dict) else {}


def _whole(rates: object) -> Rates | None:
    """What a cache holds, if it is what `measure` returns."""
    if not isinstance(rates, dict) or rates.keys() != _FORMATS.keys():
        return None
    fine = all(rate is None or (isinstance(rate, float) and rate > 0) for rate in rates.values())
    return rates if fine else None


def _forget(key: str) -> None:
    known = _read()
    if known.pop(key, None) is not None:
        _write(known)


def _write(content: Mapping[str, object]) -> None:
    """Replaced whole, so that whoever reads meanwhile finds the old or the new."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "w") as temporary:
            json.dump(content, temporary, indent=1)
        Path(name).replace(file)


if __name__ == "__main__":
    torch.set_num_threads(1)  # two that wait for each other on busy cores measure the waiting
    print(json.dumps(measure()))
