"""What the kernels of linear_recurrence share: loads of tiles, and products of decays that never exceed 1."""

import triton
import triton.language as tl

from hybridlab.kernels import decay

LEAST = tl.constexpr(decay.LEAST)  # exp of it is 0; finite, so that differences of sums are


@triton.jit
def chunk_of(chunks, n, time, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """First token and number of tokens of chunk n; its document; whether that begins, and ends, in this chunk."""
    if PACKED:
        begin = tl.load(chunks + n * 5)
        length = tl.load(chunks + n * 5 + 1)
        doc = tl.load(chunks + n * 5 + 2)
        first = tl.load(chunks + n * 5 + 3) != 0
        last = tl.load(chunks + n * 5 + 4) != 0
    else:
        begin = n * CHUNK
        length = tl.minimum(CHUNK, time - begin)
        doc = n * 0
        first = n == 0
        last = begin + length == time
    return begin.to(tl.int64), length, doc.to(tl.int64), first, last


@triton.jit
def load_tile(x, tokens, columns, x_time, live, width, DOT: tl.constexpr):
    """x[tokens, columns] in DOT's type, 0 where not live or past the width; tokens down, or across."""
    tile = tl.load(x + tokens * x_time + columns, mask=live & (columns < width), other=0.0)
    return tile.to(tl.float32).to(DOT)


@triton.jit
def load_log_decays(g, c, g_time, live, DECAY: tl.constexpr):
    """Log decays [c] of one head in float32, 0 where not live."""
    if DECAY == 0:
        x = tl.zeros(c.shape, tl.float32)
    else:
        if DECAY == 1:
            x = tl.zeros(c.shape, tl.float32) + tl.load(g).to(tl.float32)
        else:
            x = tl.load(g + c * g_time, mask=live, other=0.0).to(tl.float32)
        # selected, not the larger of the two: a NaN must stay one
        x = tl.where(live, tl.where(x < LEAST, LEAST, x), 0.0)
    return x


@triton.jit
def sums_of(g):
    """Σ_{m ≤ i} g_m as high + low; e^{that}; e^{Σ_{m > i} g_m}: all [c]; and e^{Σ g}. The sums are float64."""
    total = tl.cumsum(g.to(tl.float64), 0)
    whole = tl.sum(g.to(tl.float64), 0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    return high, low, tl.exp(high), tl.exp((whole - total).to(tl.float32)), tl.exp(whole.to(tl.float32))


@triton.jit
def decays_between(high, low, keep, REVERSE: tl.constexpr):
    """e^{sum_row - sum_column} (reverse: column - row) where `keep`, else 0: [c, c]. No exponent kept is positive."""
    x = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if REVERSE:
        x = -x
    return tl.where(keep, tl.exp(tl.where(keep, x, 0.0)), 0.0)


@triton.jit
def load_channels(g, tokens, columns, g_time, live, width):
    """Log decays of every channel in float32, 0 where not live; tokens down, or across."""
    x = tl.load(g + tokens * g_time + columns, mask=live & (columns < width), other=0.0).to(tl.float32)
    return tl.where(x < LEAST, LEAST, x)


@triton.jit
def channel_decays(g, tokens, columns, g_time, length, width, AFTER: tl.constexpr, AXIS: tl.constexpr):
    """e^{Σ_{m ≤ i} g_m}, or e^{Σ_{m > i} g_m} if AFTER, of every channel; tokens run along AXIS.

    Both sums are built up, never taken from a longer one: a strong decay must not cost the weak ones their digits.
    """
    shift: tl.constexpr = 1 if AFTER else 0
    x = load_channels(g, tokens + shift, columns, g_time, tokens + shift < length, width)
    return tl.exp(tl.cumsum(x, AXIS, reverse=AFTER))
