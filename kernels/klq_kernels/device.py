"""Triton device code shared by the kernels: online softmax statistics of two distributions.

Everything is in base 2, which is what the hardware has: k = log2(e)/T, e = 2^((z − m)k), f = 2^((r − n)k), with m and n
running maxima of the raw logits z (policy) and r (reference), so that a common offset of ±1000 costs no digits. A state
holds for every row, of the tokens seen so far,

    s = Σ e    h = Σ e (z − m)k    t = Σ f    w = Σ e d    b = Σ (f − v e + v e d) = Σ v e (e^(−d) − 1 + d) ≥ 0

with d = ((z − m) − (r − n) − g)/T and v = 2^(−gk), so that f = v e e^(−d). The pivot g is what (z − m) − (r − n) is for
the maxima of the tile that m is from. About the pivot that makes w = 0, KL = log(t/(s v)) = log(1 + b/(s v)): exact for
any small KL, in one visit, since no term of b is negative and none is the difference of large numbers.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a·b + c in one rounding, whatever Triton's default becomes

import triton
import triton.language as tl

from klq_kernels import types

INF, SMALL_KL = tl.constexpr(types.INF), tl.constexpr(types.SMALL_KL)
LOWEST = tl.constexpr(-1e30)  # the maximum over nothing: finite, and below every logit
LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def empty_state(ROWS: tl.constexpr, HAS_REF: tl.constexpr):
    """(m, s, h) [ROWS] of no tokens; with a reference (m, s, h, n, t, w, b, g). It is the identity of ⊕ in Milakov and
    Gimelshein 2018."""
    low = tl.full([ROWS], LOWEST, tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    if HAS_REF:
        return low, zero, zero, low, zero, zero, zero, zero
    else:
        return low, zero, zero


@triton.jit
def _power(x):
    """2^x, without overflow."""
    return tl.exp2(tl.minimum(x, 126.0))


@triton.jit
def bregman(p, q, d):
    """p (e^(−d) − 1 + d) ≥ 0 where q = p e^(−d) is given: the estimator k3 of Schulman 2020. In |d| < 0.1 by its series
    up to d⁴, with d⁵ economised into d³ (Lanczos 1938): good to 4e-6."""
    near = p * d * (d * (0.5 - d * (0.16672917 - d * (1.0 / 24))))
    return tl.where(tl.abs(d) < 0.1, near, q + (p * d - p))


@triton.jit
def accumulate(z, r, state, k):
    """The state [rows] after one more tile of policy logits z and, if it has a reference, of that's logits r [rows,
    columns]. Source: online softmax (Milakov and Gimelshein 2018), here of the other sums too."""
    m, s, h = state[:3]
    top = tl.maximum(tl.max(z, 1), LOWEST)
    new = tl.maximum(m, top)
    z = z - new[:, None]
    x = z * k
    e = tl.exp2(x)
    fall = m - new
    scale = tl.exp2(fall * k)
    h = scale * (h + s * (fall * k)) + tl.sum(e * tl.maximum(x, LOWEST), 1)
    s *= scale
    policy = new, s + tl.sum(e, 1), h
    if len(state) == 3:
        return policy
    else:
        n, t, w, b, g = state[3:]
        nats = k * LN2
        top_ref = tl.maximum(tl.max(r, 1), LOWEST)
        new_ref = tl.maximum(n, top_ref)
        old = g + (fall - (n - new_ref))
        g = tl.where(fall < 0.0, top - new - (top_ref - new_ref), old)
        t, w, b = _move(s, t, w, b, scale, tl.exp2((n - new_ref) * k), old, g, k)
        r = r - new_ref[:, None]
        f = tl.exp2(r * k)
        d = tl.where(e > 0.0, (z - r) * nats - (g * nats)[:, None], LOWEST)
        terms = bregman(e, f * _power(g * k)[:, None], d)
        return policy + (new_ref, t + tl.sum(f, 1), w + tl.sum(e * d, 1), b + tl.sum(terms, 1) * _power(-g * k), g)


@triton.jit
def _move(s, t, w, b, scale, scale_ref, old, new, k):
    """(t, w, b) relative to other maxima, as s is already, and to another pivot: with a = (old − new)/T, w grows by
    s a, and b by v Σ e (φ(a) + d (1 − e^(−a))), φ(a) = e^(−a) − 1 + a. Where s underflows, b is all of t."""
    a = (old - new) * (k * LN2)
    v = _power(-new * k)
    t *= scale_ref
    w = tl.where(s > 0.0, w * scale, 0.0)
    b = tl.where(s > 0.0, b * scale_ref + (s - w) * bregman(v, _power(-old * k), a) + v * w * a, t)
    return t, w + s * a, b


@triton.jit
def merge(state, k):
    """The states of parts [parts] together: ⊕ of Milakov and Gimelshein 2018, for the other sums too."""
    m, s, h = state[:3]
    new = tl.max(m, 0)
    fall = m - new
    scale = tl.exp2(fall * k)
    own = s * scale
    policy = new, tl.sum(own, 0), tl.sum(scale * (h + s * (fall * k)), 0)
    if len(state) == 3:
        return policy
    else:
        n, t, w, b, g = state[3:]
        new_ref = tl.max(n, 0)
        old = g + (fall - (n - new_ref))
        g = tl.max(tl.where(fall == 0.0, old, -INF), 0)
        t, w, b = _move(own, t, w, b, scale, tl.exp2((n - new_ref) * k), old, g, k)
        return policy + (new_ref, tl.sum(t, 0), tl.sum(w, 0), tl.sum(b, 0), g)


@triton.jit
def kl_divergence(s, t, w, b, g, inv_temperature):
    """KL [rows] ≥ 0 of finished sums, and log t − log s as exactly: where it is small, KL = log(1 + b/(s v)) =
    2 artanh(y) with y = b/(2 s v + b)."""
    mean, k = w / s, inv_temperature * LOG2E
    pivot = g * inv_temperature + mean
    more = tl.log(t) - tl.log(s)
    kl = pivot + more
    _, _, b = _move(s, t, w, b, 1.0, 1.0, g, g + mean / inv_temperature, k)
    y = b / (2 * s * _power(-g * k - mean * LOG2E) + b)
    small = tl.maximum(2 * y * (1 + y * y * (1.0 / 3 + y * y * (1.0 / 5))), 0.0)
    near = kl < SMALL_KL
    return tl.where(near, small, kl), tl.where(near, small - pivot, more)


@triton.jit
def store_state(OUT, stride, live, state):
    """Write a state to OUT, OUT + stride, …; at most `PARTIALS` numbers per row."""
    for i in tl.static_range(len(state)):
        tl.store(OUT + i * stride, state[i], mask=live)
