"""Device functions that the kernels of the delta rule share: where chunks lie, products, decays, one inverse."""

import triton
import triton.language as tl


@triton.jit
def span(chunk, spans, time, per_row, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of a chunk, and the end of its document, among the tokens of all rows; equal for an unused chunk."""
    if PACKED:
        start = tl.load(spans + 2 * chunk).to(tl.int64)
        stop = tl.load(spans + 2 * chunk + 1).to(tl.int64)
    else:
        row = chunk // per_row
        start = row * time + (chunk - row * per_row) * C
        stop = (row + 1) * time
    return start, stop


@triton.jit
def chunks_of(row, begins, per_row, PACKED: tl.constexpr):
    """First chunk of a row or document, and the first that is no longer its own."""
    if PACKED:
        first = tl.load(begins + row).to(tl.int64)
        last = tl.load(begins + row + 1).to(tl.int64)
    else:
        first = row.to(tl.int64) * per_row
        last = first + per_row
    return first, last


@triton.jit
def rounded(x):
    """To the nearest number with the 11 bits of tf32; tensor cores would cut the others off. NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, LOW: tl.constexpr):
    """a @ b of float32 operands; for bfloat16 inputs (LOW), which have 8 bits, operands are rounded to tf32's 11."""
    if LOW:
        y = tl.dot(rounded(a), rounded(b), input_precision="tf32")
    else:
        y = tl.dot(a, b, input_precision="ieee")
    return y


@triton.jit
def product_of_inputs(a, b, LOW: tl.constexpr):
    """a @ b in float32 of tiles of the inputs, which for bfloat16 inputs (LOW) are bfloat16 exactly."""
    DTYPE: tl.constexpr = tl.bfloat16 if LOW else tl.float32
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision="ieee")


@triton.jit
def tile(base, rows, columns, stride, inside):
    """x[rows, columns] of x [.., stride] for rows [r, 1] (int64) and columns [1, c]; zeros outside; float32."""
    return tl.load(base + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put(base, rows, columns, stride, inside, x):
    """The store that `tile` is the load of; rounds to the dtype in memory."""
    tl.store(base + rows * stride + columns, x, mask=inside)


@triton.jit
def square(base, at, C: tl.constexpr):
    """Matrix `at` of [.., c, c]; float32."""
    i = tl.arange(0, C)
    return tl.load(base + at * (C * C) + i[:, None] * C + i[None, :]).to(tl.float32)


@triton.jit
def put_square(base, at, x, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(base + at * (C * C) + i[:, None] * C + i[None, :], x)


@triton.jit
def at_least(g):
    """Log decays below -1000 count as -1000, so that differences of their sums are finite; NaN stays NaN."""
    return tl.where(g < -1000.0, -1000.0, g)


@triton.jit
def decay_between(g, C: tl.constexpr):
    """exp(Σ_{j < m ≤ i} g_m) for i ≥ j [c, c]; since the start, i included, and up to the end, j left out, both [c].

    Sums are float64, their differences float32: a strong decay must not cost the weak ones after it their digits.
    """
    i = tl.arange(0, C)
    total = tl.cumsum(at_least(g).to(tl.float64), 0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.where(i[:, None] > i[None, :], between, 0.0))
    rest = tl.sum(tl.where(i == C - 1, total, 0.0), 0) - total
    since = tl.exp(high)
    return decay, since + since * low, tl.exp(rest.to(tl.float32))


@triton.jit
def halves(x, S: tl.constexpr, C: tl.constexpr):
    """Row sums of the lower and of the upper half of every block of 2 S rows, each given to all rows of its block."""
    upper = ((tl.arange(0, C) // S) % 2 == 1)[:, None]
    P: tl.constexpr = C // (2 * S)
    BK: tl.constexpr = x.shape[1]
    low = tl.sum(tl.reshape(tl.where(upper, 0.0, x), [P, 2 * S, BK]), axis=1)
    high = tl.sum(tl.reshape(tl.where(upper, x, 0.0), [P, 2 * S, BK]), axis=1)
    low = tl.reshape(tl.broadcast_to(low[:, None, :], [P, 2 * S, BK]), [C, BK])
    high = tl.reshape(tl.broadcast_to(high[:, None, :], [P, 2 * S, BK]), [C, BK])
    return low, high


@triton.jit
def meeting(S: tl.constexpr, C: tl.constexpr):
    """bool [c, c]: row i in an odd block of S rows, column j in the even block before it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i // (2 * S) == j // (2 * S)) & ((i // S) % 2 == 1) & ((j // S) % 2 == 0)


@triton.jit
def _diagonal(low, B: tl.constexpr, S: tl.constexpr):
    """The blocks of S rows on the diagonal of low [B·S, B·S]: [B, S, S]"""
    blocks = tl.reshape(low, [B, S, B, S])
    i, j = tl.arange(0, B)[:, None, None, None], tl.arange(0, B)[None, None, :, None]
    return tl.sum(tl.where(i == j, blocks, 0.0), axis=2)


@triton.jit
def _merge(x, low, P: tl.constexpr, S: tl.constexpr):
    """Inverses x [2 P, S, S] of the blocks on the diagonal of I + low -> [P, 2 S, 2 S], of blocks twice the size."""
    half = tl.arange(0, 2)
    pairs = tl.reshape(x, [P, 2, S, S])
    even = tl.sum(tl.where((half == 0)[None, :, None, None], pairs, 0.0), axis=1)
    odd = tl.sum(tl.where((half == 1)[None, :, None, None], pairs, 0.0), axis=1)
    between = tl.reshape(_diagonal(low, P, 2 * S), [P, 2, S, 2 * S])
    between = tl.sum(tl.where((half == 1)[None, :, None, None], between, 0.0), axis=1)
    between = tl.reshape(between, [P, S, 2, S])
    between = tl.sum(tl.where((half == 0)[None, None, :, None], between, 0.0), axis=2)
    below = -tl.dot(odd, tl.dot(between, even, input_precision="ieee"), input_precision="ieee")
    i, j = half[None, :, None, None, None], half[None, None, None, :, None]
    merged = tl.where(i == j, pairs[:, :, :, None, :], tl.where(i > j, below[:, None, :, None, :], 0.0))
    return tl.reshape(merged, [P, 2 * S, 2 * S])


@triton.jit
def inverse(low, C: tl.constexpr):
    """(I + low)⁻¹ in float32 for low [c, c], zero on and above the diagonal; c a power of two from 16 to 128.

    Blocks double in size, from the ones on the diagonal: (A 0; B D)⁻¹ = (A⁻¹ 0; -D⁻¹ B A⁻¹ D⁻¹). Powers of `low` are
    never formed: for like keys they grow as binomial coefficients, the inverse does not.
    """
    blocks = _diagonal(low, C // 16, 16)
    i = tl.arange(0, 16)
    x = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, tl.where(meeting(1, 16)[None, :, :], -blocks, 0.0))
    for level in tl.static_range(1, 4):
        between = tl.where(meeting(1 << level, 16)[None, :, :], blocks, 0.0)
        x -= tl.dot(x, tl.dot(between, x, input_precision="ieee"), input_precision="ieee")
    if C > 16:
        x = _merge(x, low, C // 32, 16)
    if C > 32:
        x = _merge(x, low, C // 64, 32)
    if C > 64:
        x = _merge(x, low, C // 128, 64)
    return tl.reshape(x, [C, C])
