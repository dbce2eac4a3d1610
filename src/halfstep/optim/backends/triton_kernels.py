"""Triton kernels of one step: `prepare`, one for each family of rules, and the survey of gradients.

Each is what `halfstep.optim.backends.eager` does, in one pass over memory for all tensors of a launch; storage and
addresses are in `halfstep.optim.backends.triton_formats`. `prepare` runs first: it counts the step, and computes in
float64, on the device, what is the same for all elements of a job, so that nothing waits for a step count, a learning
rate or a flag.

**Rounding.** Launches turn the contraction of products and sums off, and the rules ask for the rounded square root and
division: they round where they are written to, alike for every storage, so an `exact` master gets the bits that an FP32
parameter gets. Where torch's kernels fuse a product and a sum, ``tl.fma`` says so. What is left between these and
the oracle are the places where torch's own kernels are compiled to fuse and these do not: an ulp of an operand.
"""

# Functions of Triton's language are no Python functions: shapes and dtypes are in the docstrings.
# mypy: ignore-errors
# Capitals: what is compiled in. Comparisons and branches are read by Triton, which has its own taste.
# ruff: noqa: N803, SIM108

import triton
import triton.language as tl

from halfstep.optim.backends.triton_formats import (
    COLUMNS,
    GRADIENT,
    GROUP,
    INF,
    KEPT,
    MAGNITUDE,
    PARAMETER,
    SCALES,
    STATES,
    STEP,
    bits_of,
    layout,
    narrow,
    noise_for,
    pointer,
    read_master,
    read_state,
    tile_of,
    value_of,
    wide,
    write_master,
    write_state,
)

#: Columns of the numbers that `prepare` computes, one row for each job, float32.
NUMBERS = tl.constexpr(4)
RATE = tl.constexpr(0)  #: learning rate, in Adam over the first bias correction
ROOT = tl.constexpr(1)  #: Adam's square root of the second bias correction
DECAY = tl.constexpr(2)  #: what decoupled weight decay multiplies by
COUNT = tl.constexpr(3)  #: the number of this step

_SMALL = tl.constexpr(0x3EB0C6F7A0B5ED8D)  # the bits of 1e-6 in float64


# Rules ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _double(high, low):
    """A Python float that came as two float32, exact to 48 bits."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit(do_not_specialize=["count"])
def prepare(
    table, numbers, count, found_inf, lr_tensor, lr, lr_low, log1, log1_low, log2, log2_low,
    weight_decay, weight_decay_low,
    ADAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the step of every job, and compute in float64 what is the same for all of its elements."""
    job = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = job < count
    steps = tl.load(table + job * COLUMNS + STEP, inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, inside, other=0.0) + 1.0
    counted = count
    if found_inf is not None:
        counted = tl.where(tl.load(found_inf) == 0.0, count, 0)
    tl.store(steps, step, job < counted)
    if lr_tensor is not None:
        rate = tl.load(lr_tensor).to(tl.float64)
    else:
        rate = _double(lr, lr_low)
    decay = 1.0 - rate * _double(weight_decay, weight_decay_low)
    rates = tl.full((BLOCK,), 0.0, tl.float64) + rate
    root = tl.full((BLOCK,), 1.0, tl.float64)
    if ADAM:
        times = step.to(tl.float64)
        rates = rates / (1.0 - tl.exp(times * _double(log1, log1_low)))
        root = tl.sqrt(1.0 - tl.exp(times * _double(log2, log2_low)))
    row = numbers + job * NUMBERS
    tl.store(row + RATE, rates.to(tl.float32), inside)
    tl.store(row + ROOT, root.to(tl.float32), inside)
    tl.store(row + DECAY, (tl.full((BLOCK,), 0.0, tl.float64) + decay).to(tl.float32), inside)
    tl.store(row + COUNT, step, inside)


@triton.jit
def _chunk(table, chunks, found_inf, GROUPS: tl.constexpr, TILES: tl.constexpr, RAGGED: tl.constexpr,
           ALIGNED: tl.constexpr):  # fmt: skip
    """What this program works on: the job, its first group, its layout, and how many tiles: none in a skipped step."""
    job = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1)
    numel, row, per_row, groups = layout(table, job, RAGGED, ALIGNED)
    tiles = tl.minimum((groups - first + GROUPS - 1) // GROUPS, TILES).to(tl.int32)
    if found_inf is not None:
        tiles = tl.where(tl.load(found_inf) == 0.0, tiles, 0)
    return job, first, numel, row, per_row, groups, tiles


@triton.jit
def _gradient(gradients, offsets, inside, coefficient, MAXIMIZE: tl.constexpr):
    g = wide(tl.load(gradients + offsets, inside, other=0.0))
    if coefficient is not None:
        g = g * tl.load(coefficient).to(tl.float32)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def _lerp(start, end, weight):
    """``torch.lerp``: from the nearer end."""
    weight = tl.cast(weight, tl.float32)
    near = weight < 0.5
    return tl.fma(end - start, tl.where(near, weight, weight - 1.0), tl.where(near, start, end))


@triton.jit
def adam(
    table, chunks, numbers, coefficient, found_inf, weight1, beta2, weight2, eps, weight_decay,
    DECOUPLED: tl.constexpr, COUPLED: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, STATE0: tl.constexpr, STATE1: tl.constexpr,
    STOCHASTIC: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, STATE2: tl.constexpr = None,
):  # fmt: skip
    """Adam and AdamW; weight1 and weight2 are 1 - beta1 and 1 - beta2."""
    job, first, numel, row, per_row, groups, tiles = _chunk(table, chunks, found_inf, GROUPS, TILES, RAGGED, ALIGNED)
    parameters = pointer(table, job, PARAMETER, WEIGHT, ALIGNED)
    gradients = pointer(table, job, GRADIENT, GRAD, ALIGNED)
    kept = parameters if MASTER is None else pointer(table, job, KEPT, MASTER, ALIGNED)
    means = pointer(table, job, STATES, STATE0, ALIGNED)
    squares = pointer(table, job, STATES + 1, STATE1, ALIGNED)
    mean_scales = pointer(table, job, SCALES, tl.float32, False)
    square_scales = pointer(table, job, SCALES + 1, tl.float32, False)
    rate = tl.load(numbers + job * NUMBERS + RATE)
    root = tl.load(numbers + job * NUMBERS + ROOT)
    decay = tl.load(numbers + job * NUMBERS + DECAY)
    count = tl.load(numbers + job * NUMBERS + COUNT)
    for tile in range(tiles):
        group, at, exists, inside = tile_of(first + tile * GROUPS, numel, row, per_row, groups, GROUPS, RAGGED)
        g = _gradient(gradients, at, inside, coefficient, MAXIMIZE)
        x = read_master(parameters, kept, at, inside, MASTER)
        mean = read_state(means, mean_scales, at, inside, group, exists)
        square = read_state(squares, square_scales, at, inside, group, exists)
        if DECOUPLED:
            x = x * decay
        if COUPLED:
            g = tl.fma(x, weight_decay, g)
        mean = _lerp(mean, g, weight1)
        square = tl.fma(g * weight2, g, square * beta2)
        largest = square
        if AMSGRAD:
            maxima = pointer(table, job, STATES + 2, STATE2, ALIGNED)
            maxima_scales = pointer(table, job, SCALES + 2, tl.float32, False)
            largest = read_state(maxima, maxima_scales, at, inside, group, exists)
            largest = tl.where((square > largest) | (square != square), square, largest)
            write_state(largest, table, job, 3, count, maxima, maxima_scales, at, inside, group, exists, True)
        write_state(mean, table, job, 1, count, means, mean_scales, at, inside, group, exists, False)
        write_state(square, table, job, 2, count, squares, square_scales, at, inside, group, exists, True)
        x = x + tl.div_rn(mean * -rate, tl.div_rn(tl.sqrt_rn(largest), root) + eps)
        noise = noise_for(table, job, 0, count, at) if STOCHASTIC else 0
        write_master(x, noise, parameters, kept, at, inside, MASTER, STOCHASTIC)


@triton.jit
def sgd(
    table, chunks, numbers, coefficient, found_inf, momentum, kept_share, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, STATE0: tl.constexpr = None,
):  # fmt: skip
    """SGD; kept_share is 1 - dampening."""
    job, first, numel, row, per_row, groups, tiles = _chunk(table, chunks, found_inf, GROUPS, TILES, RAGGED, ALIGNED)
    parameters = pointer(table, job, PARAMETER, WEIGHT, ALIGNED)
    gradients = pointer(table, job, GRADIENT, GRAD, ALIGNED)
    kept = parameters if MASTER is None else pointer(table, job, KEPT, MASTER, ALIGNED)
    rate = tl.load(numbers + job * NUMBERS + RATE)
    count = tl.load(numbers + job * NUMBERS + COUNT)
    for tile in range(tiles):
        group, at, exists, inside = tile_of(first + tile * GROUPS, numel, row, per_row, groups, GROUPS, RAGGED)
        g = _gradient(gradients, at, inside, coefficient, MAXIMIZE)
        x = read_master(parameters, kept, at, inside, MASTER)
        if COUPLED:
            g = tl.fma(x, weight_decay, g)
        if MOMENTUM:
            buffers = pointer(table, job, STATES, STATE0, ALIGNED)
            scales = pointer(table, job, SCALES, tl.float32, False)
            buffer = read_state(buffers, scales, at, inside, group, exists)
            buffer = tl.where(count <= 1.0, g, tl.fma(g, kept_share, buffer * momentum))
            write_state(buffer, table, job, 1, count, buffers, scales, at, inside, group, exists, False)
            g = tl.fma(buffer, momentum, g) if NESTEROV else buffer
        x = tl.fma(g, -rate, x)
        noise = noise_for(table, job, 0, count, at) if STOCHASTIC else 0
        write_master(x, noise, parameters, kept, at, inside, MASTER, STOCHASTIC)


@triton.jit
def lion(
    table, chunks, numbers, coefficient, found_inf, weight1, weight2,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, STATE0: tl.constexpr,
    STOCHASTIC: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Lion; weight1 and weight2 are 1 - beta1 and 1 - beta2."""
    job, first, numel, row, per_row, groups, tiles = _chunk(table, chunks, found_inf, GROUPS, TILES, RAGGED, ALIGNED)
    parameters = pointer(table, job, PARAMETER, WEIGHT, ALIGNED)
    gradients = pointer(table, job, GRADIENT, GRAD, ALIGNED)
    kept = parameters if MASTER is None else pointer(table, job, KEPT, MASTER, ALIGNED)
    means = pointer(table, job, STATES, STATE0, ALIGNED)
    scales = pointer(table, job, SCALES, tl.float32, False)
    rate = tl.load(numbers + job * NUMBERS + RATE)
    decay = tl.load(numbers + job * NUMBERS + DECAY)
    count = tl.load(numbers + job * NUMBERS + COUNT)
    for tile in range(tiles):
        group, at, exists, inside = tile_of(first + tile * GROUPS, numel, row, per_row, groups, GROUPS, RAGGED)
        g = _gradient(gradients, at, inside, coefficient, MAXIMIZE)
        x = read_master(parameters, kept, at, inside, MASTER)
        mean = read_state(means, scales, at, inside, group, exists)
        if DECOUPLED:
            x = x * decay
        toward = _lerp(mean, g, weight1)
        x = tl.fma(tl.where(toward > 0, 1.0, tl.where(toward < 0, -1.0, 0.0)), -rate, x)
        write_state(_lerp(mean, g, weight2), table, job, 1, count, means, scales, at, inside, group, exists, False)
        noise = noise_for(table, job, 0, count, at) if STOCHASTIC else 0
        write_master(x, noise, parameters, kept, at, inside, MASTER, STOCHASTIC)


# Survey ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first_chunk"])
def survey_chunk(
    table, chunks, first_chunk, sums, maxima,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of one chunk the sum of squares (float64) and the bits of the largest magnitude (int32)."""
    job, first, numel, row, per_row, groups, tiles = _chunk(table, chunks, None, GROUPS, TILES, False, ALIGNED)
    gradients = pointer(table, job, GRADIENT, GRAD, ALIGNED)
    total = tl.zeros((GROUPS, GROUP), tl.float64)
    largest = tl.zeros((GROUPS, GROUP), tl.int32)
    for tile in range(tiles):
        _, at, _, inside = tile_of(first + tile * GROUPS, numel, row, per_row, groups, GROUPS, False)
        g = wide(tl.load(gradients + at, inside, other=0.0))
        double = g.to(tl.float64)
        total += double * double
        largest = tl.maximum(largest, bits_of(g) & MAGNITUDE)
    place = first_chunk + tl.program_id(0)
    tl.store(sums + place, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(maxima + place, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def survey_gradient(spans, sums, maxima, total, amax, BLOCK: tl.constexpr):
    """Put together what `survey_chunk` found in the chunks of one gradient, always in the same order."""
    job = tl.program_id(0)
    start = tl.load(spans + 2 * job)
    count = tl.load(spans + 2 * job + 1)
    part = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        part += tl.load(sums + start + index, index < count, other=0.0)
        largest = tl.maximum(largest, tl.load(maxima + start + index, index < count, other=0))
    tl.store(total + job, tl.sum(part, axis=0))
    tl.store(amax + job, value_of(tl.max(largest, axis=0)))


@triton.jit
def _double_of(bits):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["limit"])
def arrive(
    spans, sums, maxima, total, flag, amax, running, any_found, found, coefficient, inverse, before, limit,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`survey_gradient` of one gradient, and `halfstep.optim.arrivals.Tally.add` of that, in one program.

    total, flag and amax are the survey's; running (float64) and any_found are the tally's, and are added to; found and
    coefficient are for the update that follows. limit: the bits of a float64, for Triton takes a number as a float32.
    """
    start = tl.load(spans)
    count = tl.load(spans + 1)
    part = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        part += tl.load(sums + start + index, index < count, other=0.0)
        largest = tl.maximum(largest, tl.load(maxima + start + index, index < count, other=0))
    squares = tl.sum(part, axis=0)
    bits = tl.max(largest, axis=0)
    tl.store(total, squares)
    tl.store(flag, tl.where(bits < INF, 0.0, 1.0))
    tl.store(amax, value_of(bits))
    quotient = value_of(bits)
    if inverse is not None:
        factor = tl.load(inverse)
        quotient = quotient * factor
        double = factor.to(tl.float64)
        squares = squares * (double * double)
    finite = (bits_of(quotient) & MAGNITUDE) < INF
    squares = tl.load(running) + tl.where(finite, squares, 0.0)
    overflowed = tl.where(finite, 0.0, 1.0)
    tl.store(running, squares)
    tl.store(any_found, tl.maximum(tl.load(any_found), overflowed))
    tl.store(found, overflowed)
    if LIMITED:
        norm = tl.sqrt(squares)
        if before is not None:
            norm = tl.maximum(norm, tl.load(before).to(tl.float64))
        # As torch divides a number by a tensor.
        share = (1.0 / (norm + _double_of(_SMALL))) * _double_of(limit)
        share = tl.minimum(share, 1.0)
        if inverse is not None:
            share = share * tl.load(inverse).to(tl.float64)
        tl.store(coefficient, share.to(tl.float32))


# Masters beside parameters --------------------------------------------------------------------------------------------


@triton.jit
def follow(
    table, chunks,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Set each element of a float32 master that does not round to its parameter's to what the parameter is."""
    job, first, numel, row, per_row, groups, tiles = _chunk(table, chunks, None, GROUPS, TILES, False, ALIGNED)
    parameters = pointer(table, job, PARAMETER, WEIGHT, ALIGNED)
    masters = pointer(table, job, KEPT, tl.float32, ALIGNED)
    for tile in range(tiles):
        _, at, _, inside = tile_of(first + tile * GROUPS, numel, row, per_row, groups, GROUPS, False)
        x = wide(tl.load(parameters + at, inside, other=0.0))
        rounded = wide(narrow(tl.load(masters + at, inside, other=0.0), WEIGHT))
        tl.store(masters + at, x, inside & (rounded != x))
