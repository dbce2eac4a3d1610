"""An unmodified script under a policy.

``script`` runs a Python file as if it were ``__main__``; ``patches`` puts halfstep where PyTorch's training
loop passes through (module call, backward, optimizer step, scheduler step) and takes it out again; ``session`` decides
what happens there; ``seeds`` gives each run of a comparison its own random numbers.
"""

from halfstep.launch.run import Run, run_under_policy
from halfstep.launch.script import ScriptError
from halfstep.launch.session import UnsupportedError

__all__ = ["Run", "ScriptError", "UnsupportedError", "run_under_policy"]
