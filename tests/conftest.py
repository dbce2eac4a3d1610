"""For all tests: signals as a terminal has them, a cache folder of their own, and PyTorch's switches free to be set."""

import os
import signal
from pathlib import Path

import pytest
import torch

# Started in the background or under nohup, this process ignores Ctrl-C, and so would every process that a test starts
# and interrupts; a handler here means the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared by the processes of a run, so that what is measured of the machine is measured once; not the user's.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "cache")


@pytest.fixture(autouse=True)
def _switches_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own test files, from which some tests take lists, forbid it for the process as they are imported."""
    # The module stands behind an object of its own, which passes on what is read and not what is set.
    module = torch.backends.flags_frozen.__globals__
    monkeypatch.setitem(module, "__allow_nonbracketed_mutation_flag", True)
