"""What pyproject.toml cannot say: how the optimizer kernels are compiled, and that halfstep installs without them."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/halfstep/optim/backends/kernels")

# Contraction would round differently from torch where torch does not contract; nobody reads errno or traps. Never
# -ffast-math: it assumes that NaN and infinity do not exist, and links code by which the whole process loses
# subnormals.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-g0"]
if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
    FLAGS.append("-mprefer-vector-width=512")  # of the versions that have such vectors; see CLONES in plan.h

setup(
    ext_modules=[
        Extension(
            "halfstep.optim.backends._kernels",
            sources=sorted(path.as_posix() for path in KERNELS.glob("*.c")),
            depends=sorted(path.as_posix() for path in KERNELS.glob("*.h")),
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,  # no compiler: the eager backend does the work, slower
        )
    ]
)
