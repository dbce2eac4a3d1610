"""Steps interrupted by real alarms at random moments: how many were made, how many were not, and whether any was
neither.

Each interruption is of a fresh loop's first step (`tests/interruptions.py`, which says what is compared). An
interrupted step that is not bit for bit a step that was made, or one that was not and can be repeated, ends the program
with its seed.

    python benchmarks/interrupts.py --count 500
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from interruptions import interruptions

POLICIES = ("fp16-mixed:emulate", "bf16-mixed", "bf16-master", "fp16-master:emulate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="interruptions of each optimizer and policy")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for policy in POLICIES:
        for name in ("adamw", "sgd"):
            counts = interruptions(name, policy, seed=options.seed, count=options.count)
            print(f"{policy:20} {name:6} {counts}", flush=True)


if __name__ == "__main__":
    main()
