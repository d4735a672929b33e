"""Triton device code shared by the kernels: online softmax statistics of two distributions, and their gradient.

A row's statistics are kept relative to running maxima m (policy) and n (reference) of the raw logits, in units of the
temperature: s = Σ e^x, h = Σ e^x x, t = Σ e^y and w = Σ e^x (x − y), where x = (z − m)/T and y = (r − n)/T. Working
with differences keeps a common offset of ±1000 from costing digits.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a·b + c in one rounding, whatever Triton's default becomes

import triton
import triton.language as tl

from klq_kernels import types

INF, SMALL_KL = tl.constexpr(types.INF), tl.constexpr(types.SMALL_KL)


@triton.jit
def _finite(x):
    """x, or 0 where it is −inf: a maximum over nothing."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def shrink(scale, x):
    """scale · x [rows], and 0 where scale is 0 even if x is infinite."""
    return tl.where(scale == 0.0, 0.0, scale * x)


@triton.jit
def accumulate(z, m, s, h, inv_temperature):
    """Add a tile of policy logits z [rows, columns] to (m, s, h) [rows]; also x = (z − m)/T, e^x and the old sums'
    scale and shift. Source: online softmax (Milakov and Gimelshein 2018), here of Σ e^x x too."""
    new = tl.maximum(m, tl.max(z, 1))
    x = (z - _finite(new)[:, None]) * inv_temperature
    e = tl.exp(x)
    shift = (_finite(m) - _finite(new)) * inv_temperature
    scale = tl.where(m == -INF, 0.0, tl.exp(shift))
    h = shrink(scale, h + s * shift) + tl.sum(tl.where(e > 0.0, e * x, 0.0), 1)
    return new, s * scale + tl.sum(e, 1), h, x, e, s, scale, shift


@triton.jit
def accumulate_ref(r, x, e, s_old, scale, shift, n, t, w, inv_temperature):
    """Add a tile of reference logits r [rows, columns] to (n, t, w) [rows], given what `accumulate` returned for the
    policy's tile: online softmax (Milakov and Gimelshein 2018) of two distributions at once."""
    new = tl.maximum(n, tl.max(r, 1))
    y = (r - _finite(new)[:, None]) * inv_temperature
    shift_ref = (_finite(n) - _finite(new)) * inv_temperature
    scale_ref = tl.where(n == -INF, 0.0, tl.exp(shift_ref))
    w = shrink(scale, w + s_old * (shift - shift_ref)) + tl.sum(tl.where(e > 0.0, e * (x - y), 0.0), 1)
    return new, t * scale_ref + tl.sum(tl.exp(y), 1), w


@triton.jit
def bregman(x, y):
    """p (e^(−d) − 1 + d) with d = log(p/q) from log-probs x, y [rows, columns]: ≥ 0, and Σ of it is KL even where that
    is 1e−8. Source: the estimator k3 of Schulman 2020, summed over the vocabulary."""
    p = tl.exp(x)
    q = tl.exp(y)
    d = tl.where((p > 0.0) & (q > 0.0), x - y, 0.0)
    near = p * d * d * (0.5 - d * (1.0 / 6 - d * (1.0 / 24 - d * (1.0 / 120))))
    return tl.where(tl.abs(d) < 0.1, near + tl.where((p > 0.0) & (q > 0.0), 0.0, q - p), q - p + p * d)


@triton.jit
def softmax_gradient(x, y, a, b, c, entropy, kl, chosen, HAS_B: tl.constexpr, HAS_C: tl.constexpr):
    """T dL/dz [rows, columns] from log-probs x (reference: y): arXiv 2508.17000, eq. (2), differentiated as in
    `torch_logits.logits_grad`."""
    p = tl.exp(x)
    g = -a + tl.zeros_like(x)
    if HAS_B:
        g -= b * (x + entropy)
    if HAS_C:
        g += tl.where(kl < INF, c * (x - y - kl), 0.0)
    return tl.where(p > 0.0, p * g, 0.0) + tl.where(chosen, a, 0.0)
