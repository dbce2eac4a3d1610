"""Division by a number known beforehand: what kernels/division.h says of a divisor holds for every fraction of x.

A program in C is made of the header and goes through all 2^23 of them: a float's exponent does not matter there.
Steps of Adam then show that the loops divide as the header says.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from native_cases import CorrectRoots, assert_same_bits, clone, make_job
from torch import Tensor

from halfstep.optim import backends
from halfstep.optim.backends import eager, native
from halfstep.optim.rules import Adam

KERNELS = Path(backends.__file__).parent / "kernels"
COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]

PROGRAM = r"""
#include <stdio.h>
#include "division.h"

/* For each divisor read: whether two operations are said to do, and how often they give another quotient. */
#pragma GCC optimize("O3,no-math-errno,no-trapping-math")
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
static int wrong_in_two(struct divisor by) {
    int wrong = 0;
    for (uint32_t x = 0x800000; x < 0x1000000; x++) wrong += quotient_of((float)x, by) != (float)x / by.value;
    return wrong;
}

int main(void) {
    float value;
    while (fread(&value, sizeof value, 1, stdin) == 1) {
        const struct divisor by = divisor_of(value);
        const int last = quotient_of(0.0f, by) == 0.0f && quotient_of(__builtin_inff(), by) == __builtin_inff();
        printf("%d %d %d\n", divides_in_two(by), wrong_in_two(by), last);
    }
    return 0;
}
"""


def roots() -> list[float]:
    """sqrt(1 - beta2^t), of which a run meets one at each step, and some that are built to be difficult."""
    steps = [*range(1, 40), 100, 1000, 5000, 16000, 17000, 10**6]
    of_runs = [(1.0 - beta2**t) ** 0.5 for beta2 in (0.9, 0.95, 0.99, 0.999, 0.9999) for t in steps]
    draw = np.random.default_rng(0)
    drawn = [*draw.uniform(0.5, 1.0, 100), *(draw.integers(2**20, 2**21, 50) * 8 / 2**24)]
    drawn += [k * step / 2**24 for step in (2, 4) for k in draw.integers(2**23 // step, 2**24 // step, 200)]
    few_bits = [k / 256 for k in range(128, 257, 3)] + [k / 2**19 for k in range(2**18 + 1, 2**19, 9973)]
    near_powers = [1.0 - k * 2**-24 for k in range(1, 30)] + [0.5 + k * 2**-24 for k in range(30)]
    return [*of_runs, *drawn, *few_bits, *near_powers, 1.0, 2.0**-39, 3 * 2.0**-40]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
def test_the_divisors_that_two_operations_divide_by_are_told_from_the_others(tmp_path: Path) -> None:
    source, program = tmp_path / "division.c", tmp_path / "division"
    source.write_text(PROGRAM)
    flags = ["-O2", "-ffp-contract=off", f"-I{KERNELS}", "-o", str(program), str(source), "-lm"]
    subprocess.run([COMPILER, *flags], check=True)
    divisors = np.array(roots(), np.float32)
    done = subprocess.run([program], input=divisors.tobytes(), capture_output=True, check=True)
    found = np.array([line.split() for line in done.stdout.decode().splitlines()], int)
    assert len(found) == len(divisors)
    said, wrong, ends = found.T
    assert ends.all()
    never_too_hopeful = said & (wrong > 0)
    assert not never_too_hopeful.any(), divisors[never_too_hopeful.astype(bool)]
    # An exact reciprocal leaves nothing in the second float; where it leaves too little, caution is right.
    too_careful = (said == 0) & (wrong == 0) & (np.log2(divisors) % 1 != 0)
    assert too_careful.mean() < 0.01, divisors[too_careful]
    assert 0.85 < said.mean() < 0.98  # both kinds occur


def hard_to_divide(divisor: float) -> Tensor:
    """Those of the float32 in [1, 4) whose quotients lie nearest to a middle between two floats."""
    x = torch.arange(1 << 23, 1 << 24).double().mul_(2.0**-23)
    x = torch.cat((x, 2 * x))
    places = torch.frexp(x / torch.tensor(divisor).double()).mantissa * 2**24
    return x[(places - places.floor() - 0.5).abs() < 2.0**-21].float()


@pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "there")
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 23, 24])  # of 2, 4, 23 and 24 two operations are not enough
def test_adam_divides_right_where_it_is_hard(step: int) -> None:
    beta2 = 0.5  # an average's product with it is exact: the root is what this test chose
    hard = hard_to_divide((1 - beta2**step) ** 0.5)
    assert len(hard) > 0
    rule = Adam(1.0, 0.9, beta2, 0.0, 0, True, False, False)
    ours = make_job(rule, torch.float32, torch.float32, "none", "nearest", "fp32", shape=(32 * len(hard),))
    ours.step.fill_(step - 1)
    ours.parameter.zero_()
    ours.gradient.zero_()
    ours.states[0].copy_(torch.rand(ours.parameter.shape, generator=torch.Generator().manual_seed(step)))
    ours.states[1].copy_((hard.double().square() / beta2).float().repeat_interleave(32))
    theirs = clone(ours)
    native.update([ours], rule, stochastic=False, coefficient=None, found_inf=None)
    with CorrectRoots():
        eager.update([theirs], rule, stochastic=False, coefficient=None, found_inf=None)
    assert_same_bits(ours, theirs, step)
