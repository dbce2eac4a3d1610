"""For all tests: signals as a terminal has them, and a cache folder of their own."""

import os
import signal
from pathlib import Path

# Started in the background or under nohup, this process ignores Ctrl-C, and so would every process that a test starts
# and interrupts; a handler here means the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared by the processes of a run, so that what is measured of the machine is measured once; not the user's.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "cache")
