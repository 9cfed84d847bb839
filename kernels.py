"""
The fused head: hidden states in; log-prob, entropy and KL of every token out; and back again.

A loss of this recipe asks three numbers of every completion token: log p of the token that was sampled, the
student's entropy, and how far the student p is from the teacher q. Both are distributions over V words,

    p = softmax(hidden @ weight.T / temperature)
    q = softmax(teacher_hidden @ teacher_weight.T / temperature)

The obvious way, `naive_stats` below, makes [N, V] tensors of everything and autograd keeps most of them: 35
bytes for each of N x V entries, 44 GB at N = 8192 and V = 151,936. We walk over chunks of n rows instead, and
two buffers [n, V] (three without Triton) are all that ever exists of the vocabulary.

How long must it take? Take N = 8192, student D = 2048, teacher D = 4096, and an H200: 790 TFLOP/s in bf16,
4.3 TB/s.
- One student head is a matmul of 2 N D V = 5.1 TFLOP, 6.5 ms. One teacher head is twice that.
- `token_stats` has a forward and, later, a backward, which must make the logits a second time: 4 student
  heads and 2 teacher heads, 51.6 ms.
- `token_loss` forms the gradient while the chunk's logits exist: 3 student heads and 1 teacher head, 32.3 ms.
- Between the matmuls PyTorch moves 118 bytes per entry: 34 ms, as much again as the matmuls. The two Triton
  kernels below move 18: 5.2 ms.
So the floor of the fast path is 37.5 ms. These are sums, not measurements. To measure:

    python kernels.py       # checks, then times: eager on the CPU; the paper's shapes and Liger on CUDA
"""
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:             # macOS and Windows: PyTorch does everything, nothing calls these stand-ins
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)
    HAVE_TRITON = False
INTERPRET = False               # for checks: CPU tensors take the Triton path too (needs TRITON_INTERPRET=1)

# Bytes of one [n, V] buffer of logits: the dial between memory and the efficiency of the matmuls. With fp32
# logits and V = 151,936 it makes n = 128 on a CPU. On CUDA n = 640 and the workspace is 1.4 GB: two buffers,
# and what the fp32 sum of dweight has over the bf16 gradient.
CHUNK_BYTES = {"cpu": 80_000_000, "cuda": 400_000_000}

# --------------------------------------------------------------------------------------------- specification

class TokenStats(NamedTuple):
    """What a loss may ask about N tokens: vectors [N], fp32 (fp64 if the inputs are)."""
    logp: Tensor                # log p_y of the target y
    entropy: Tensor             # H(p) = - sum_v p_v log p_v
    kl: Tensor                  # the divergence of p and q; zeros without a teacher

def naive_stats(hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
                teacher_weight: Tensor | None = None, kl: str = "reverse", temperature: float = 1.0,
                jsd_weight: float = 0.5, top_k: int = 0, vocab: int = 0) -> TokenStats:
    """`token_stats` the obvious way, autograd over whole [N, V] tensors: the yardstick."""
    vocab = vocab or len(weight)
    zs = (hidden @ weight[:vocab].T).to(stats_dtype(weight)) / temperature                      # [N, V]
    logps = F.log_softmax(zs, -1)
    logp, entropy = logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)     # [N]
    if teacher_hidden is None:
        return TokenStats(logp, entropy, torch.zeros_like(logp))
    zt = (teacher_hidden.detach() @ teacher_weight.detach()[:vocab].T).to(zs.dtype) / temperature
    if top_k:
        zt, index = zt.topk(top_k)                                                              # [N, k]
        logps = F.log_softmax(zs.gather(1, index), -1)
    logqs = F.log_softmax(zt, -1)
    p, q, w = logps.exp(), logqs.exp(), jsd_weight
    if kl == "reverse":
        return TokenStats(logp, entropy, (p * (logps - logqs)).sum(-1))
    if kl == "forward":
        return TokenStats(logp, entropy, (q * (logqs - logps)).sum(-1))
    logms = torch.logaddexp(logps + math.log(1 - w), logqs + math.log(w))           # m = (1-w) p + w q
    return TokenStats(logp, entropy, ((1 - w) * p * (logps - logms) + w * q * (logqs - logms)).sum(-1))

def stats_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32

# -------------------------------------------------------------------------------- a chunk of rows in PyTorch
#
# Whatever a loss does with the three numbers, its derivative by a row's logits z is three scalars of that row
# times
#
#     d logp / dz = 1[v = y] - p
#     d H / dz    = - p (log p + H)
#     d KL / dz   = p (log p - log q - KL)                  reverse: KL(p||q) = sum p (log p - log q)
#                 = p - q                                   forward: KL(q||p) = sum q (log q - log p)
#                 = (1-w) p (log p - log m - KL(p||m))      jsd: (1-w) KL(p||m) + w KL(q||m)
#
# with m = (1-w) p + w q. Autograd would keep every intermediate of these; we overwrite the chunk's buffers.
# On a CPU that alone is worth it: the page faults of a fresh 78 MB tensor can cost ten times its arithmetic.

class Head(NamedTuple):
    """The arguments of `token_stats`."""
    hidden: Tensor                      # [N, D]
    weight: Tensor                      # [V, D]
    targets: Tensor                     # [N]
    teacher_hidden: Tensor | None       # [N, Dt]
    teacher_weight: Tensor | None       # [Vt, Dt]
    kl: str
    temperature: float
    jsd_weight: float
    top_k: int
    vocab: int

def divergence(logps: Tensor, logqs: Tensor, p: Tensor, kl: str, w: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row [n] and its slope d KL / dz [n, V]. Overwrites logqs."""
    if kl == "reverse":
        terms = torch.sub(logps, logqs, out=logqs).mul_(p)                      # p (log p - log q)
        value = terms.sum(-1)
        return value, terms.addcmul_(p, -value[:, None])
    q = logqs.exp()
    if kl == "forward":
        return logqs.sub_(logps).mul_(q).sum(-1), torch.sub(p, q, out=q)
    logms = torch.logaddexp(logps + math.log(1 - w), logqs + math.log(w))       # finite even if q / p is not
    terms = (logps - logms).mul_(p)
    kl_p, kl_q = terms.sum(-1), logqs.sub_(logms).mul_(q).sum(-1)
    return (1 - w) * kl_p + w * kl_q, terms.addcmul_(p, -kl_p[:, None]).mul_(1 - w)

def torch_stats(zs: Tensor, zt: Tensor | None, spare: Tensor, targets: Tensor, head: Head) -> tuple:
    """Statistics [3, n] of a chunk of logits [n, V], and what `torch_grads` will need. Overwrites it all."""
    logps = torch.log_softmax(zs, -1, out=zs)
    p = torch.exp(logps, out=spare)
    logp = logps.gather(1, targets[:, None])[:, 0]
    kl, kl_slope, index = torch.zeros_like(logp), None, None
    if zt is not None and head.top_k:       # p and q over the teacher's k likeliest tokens only, renormalised
        zt, index = zt.topk(head.top_k)                                         # [n, k]
        top = F.log_softmax(logps.gather(1, index), -1)
        kl, kl_slope = divergence(top, F.log_softmax(zt, -1), top.exp(), head.kl, head.jsd_weight)
    elif zt is not None:
        kl, kl_slope = divergence(logps, torch.log_softmax(zt, -1, out=zt), p, head.kl, head.jsd_weight)
    plogp = logps.mul_(p)
    entropy = -plogp.sum(-1)
    return torch.stack((logp, entropy, kl)), (p, plogp, entropy, kl_slope, index)

def torch_grads(saved: tuple, targets: Tensor, upstream: Tensor, head: Head) -> Tensor:
    """d loss / dz [n, V], in the weight's dtype, from upstream [3, n] = d loss / d (logp, entropy, kl)."""
    p, plogp, entropy, kl_slope, index = saved
    g_logp, g_entropy, g_kl = upstream[:, :, None]                              # [n, 1] each
    dz = p.mul_(-g_logp - g_entropy * entropy[:, None]).addcmul_(plogp, -g_entropy)
    dz.scatter_add_(1, targets[:, None], g_logp)
    if index is not None:
        dz.scatter_add_(1, index, kl_slope * g_kl)
    elif kl_slope is not None:
        dz.addcmul_(kl_slope, g_kl)
    return dz.to(head.weight.dtype)

# --------------------------------------------------------------------------------- a chunk of rows in Triton
#
# Kernel 1, row_stats. `torch_stats` passes over [n, V] buffers nine times: 80 bytes per entry. But a row's
# statistics are sums over v, so one read of both logits is enough: 8 bytes, predicted gain 10x. (The two
# exponentials per entry keep the special function units busy for 0.6 ms at N = 8192; the read takes 2.3
# ms.) One program per row runs the online softmax of the Triton tutorial: the maximum m so far, and sums
# measured from it; where m rises by r, what was summed shrinks by e^-r. Of the student's logits s and the
# teacher's t we keep
#
#     d = sum e^(s-m)       a = sum e^(s-m) (s-m)       gap = sum e^(s-m_s) ((s-m_s) - (t-m_t))
#     log p_y = s_y - m - log d       H = log d - a/d       KL(p||q) = gap/d_s - log(d_s/d_t)
#
# where a rise of m also lowers the factor (s-m), hence one more term in a and gap. Measured from the maxima
# nothing as large as a logit is ever subtracted, and a teacher equal to its student has a KL of exactly 0.
# The sums stay vectors of BLOCK lanes until the end, so that the loop reduces only the maxima. JSD needs
# both normalisers before it can add up log m: a second read.
#
# Kernel 2, row_grads. With the normalisers known dz is elementwise: read both logits, write dz, 10 bytes
# instead of 38. dz goes where the student's logits were. In bf16 it takes half of their space: row r's dz
# fills the first half of row r's fp32 logits, and the next matmuls read it from there. Block i lands on
# what lower blocks held, block 0 on itself. Warps drift apart, hence the barrier: no warp writes block i
# before every warp has read it.
#
# Both kernels: row offsets are int64, since n V may pass 2^31. Rows are padded to 16 entries and read up to
# there, because a mask that ends at any V would cut the 16-byte loads into single words. The check:
# `test_all.py` holds every number against fp64, in Triton's interpreter where there is no GPU, and compiles
# both kernels for sm_80, sm_90 and sm_100.

@triton.jit
def load_logits(row, col, V, stride):
    z = tl.load(row + col, mask=col < stride, other=0.0)
    return tl.where(col < V, z, -1e30)                      # not -inf: 0 * -inf is NaN

@triton.jit
def log_mixture(logp, logq, w):
    a, b = logp + tl.log(1 - w), logq + tl.log(w)
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))

@triton.jit
def row_stats(S, T, TARGETS, STATS, n, V, stride, w, KL: tl.constexpr, BLOCK: tl.constexpr):
    # S, T: logits [n, stride] of student and teacher. STATS [6, n]: logp, entropy, kl, lse_s, lse_t, mean
    row = tl.program_id(0).to(tl.int64)
    S += row * stride
    T += row * stride
    m_s, m_t = -1e30, -1e30
    d_s, d_t = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    a, gap = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        s = load_logits(S, col, V, stride)
        top_s = tl.maximum(m_s, tl.max(s, 0))
        fall_s = m_s - top_s                                # -r
        keep_s = tl.exp(fall_s)
        s -= top_s
        e_s = tl.exp(s)
        if KL != "none":
            t = load_logits(T, col, V, stride)
            top_t = tl.maximum(m_t, tl.max(t, 0))
            fall_t = m_t - top_t
            keep_t = tl.exp(fall_t)
            t -= top_t
            e_t = tl.exp(t)
            if KL == "reverse":
                gap = keep_s * (gap + (fall_s - fall_t) * d_s) + e_s * (s - t)
            if KL == "forward":
                gap = keep_t * (gap + (fall_t - fall_s) * d_t) + e_t * (t - s)
            d_t = keep_t * d_t + e_t
            m_t = top_t
        a = keep_s * (a + fall_s * d_s) + e_s * s
        d_s = keep_s * d_s + e_s
        m_s = top_s

    sum_s, sum_t = tl.sum(d_s, 0), tl.sum(d_t, 0)
    lse_s = m_s + tl.log(sum_s)
    tl.store(STATS + row, tl.load(S + tl.load(TARGETS + row)) - m_s - tl.log(sum_s))        # logp
    tl.store(STATS + n + row, tl.log(sum_s) - tl.sum(a, 0) / sum_s)                         # entropy
    tl.store(STATS + 3 * n + row, lse_s)
    if KL != "none":
        lse_t = m_t + tl.log(sum_t)
        tl.store(STATS + 4 * n + row, lse_t)
        if KL == "reverse":
            kl = tl.sum(gap, 0) / sum_s - tl.log(sum_s / sum_t)
            mean = kl
        if KL == "forward":
            kl = tl.sum(gap, 0) / sum_t - tl.log(sum_t / sum_s)
            mean = kl
        if KL == "jsd":
            kl_p, kl_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                col = start + tl.arange(0, BLOCK)
                logp = load_logits(S, col, V, stride) - lse_s
                logq = load_logits(T, col, V, stride) - lse_t
                logm = log_mixture(logp, logq, w)
                kl_p += tl.exp(logp) * (logp - logm)
                kl_q += tl.exp(logq) * (logq - logm)
            mean = tl.sum(kl_p, 0)
            kl = (1 - w) * mean + w * tl.sum(kl_q, 0)
        tl.store(STATS + 2 * n + row, kl)
        tl.store(STATS + 5 * n + row, mean)                 # what its slope subtracts: KL(p||q) or KL(p||m)

@triton.jit
def row_grads(S, T, DZ, TARGETS, STATS, UPSTREAM, n, V, stride, stride_dz, w,
              KL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    S += row * stride
    T += row * stride
    DZ += row * stride_dz
    target = tl.load(TARGETS + row)
    entropy, mean = tl.load(STATS + n + row), tl.load(STATS + 5 * n + row)
    lse_s, lse_t = tl.load(STATS + 3 * n + row), tl.load(STATS + 4 * n + row)
    g_logp, g_entropy = tl.load(UPSTREAM + row), tl.load(UPSTREAM + n + row)
    g_kl = tl.load(UPSTREAM + 2 * n + row)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        logp = load_logits(S, col, V, stride) - lse_s
        p = tl.exp(logp)
        dz = g_logp * ((col == target).to(tl.float32) - p) - g_entropy * p * (logp + entropy)
        if KL != "none":
            logq = load_logits(T, col, V, stride) - lse_t
            if KL == "reverse":
                dz += g_kl * p * (logp - logq - mean)
            if KL == "forward":
                dz += g_kl * (p - tl.exp(logq))
            if KL == "jsd":
                dz += g_kl * (1 - w) * p * (logp - log_mixture(logp, logq, w) - mean)
        tl.debug_barrier()
        tl.store(DZ + col, dz.to(DZ.dtype.element_ty), mask=col < stride)

LAUNCH = dict(BLOCK=1024, num_warps=4)      # 64 registers x 128 threads: 8 programs fit on an SM

def triton_stats(zs: Tensor, zt: Tensor | None, spare: None, targets: Tensor, head: Head) -> tuple:
    """`torch_stats` by row_stats, which leaves the logits as they are."""
    stats = torch.zeros(6, len(zs), device=zs.device)
    kl, zt = ("none", zs) if zt is None else (head.kl, zt)
    row_stats[(len(zs),)](zs, zt, targets, stats, len(zs), head.vocab, zs.stride(0), head.jsd_weight,
                          kl, **LAUNCH)
    return stats[:3], (zs, zt, kl, stats)

def triton_grads(saved: tuple, targets: Tensor, upstream: Tensor, head: Head) -> Tensor:
    """`torch_grads` by row_grads. The result is a view of the student's logits, which it overwrites."""
    zs, zt, kl, stats = saved
    dz = zs.view(head.weight.dtype)[:, :head.vocab]
    row_grads[(len(zs),)](zs, zt, dz, targets, stats, upstream, len(zs), head.vocab, zs.stride(0),
                          dz.stride(0), head.jsd_weight, kl, **LAUNCH)
    return dz

# -------------------------------------------------------------------------------------------- the chunk loop

def matmul(a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """
    out = alpha a @ b + beta out, in out's precision. bf16 operands on CUDA have an fp32 out, which takes the
    fp32 accumulator of cuBLAS as it is (torch >= 2.10). Logits rounded to bf16, in steps of 0.125 beyond 16,
    would put the gradient 4-23 % off (Liger-Kernel issue 1432), and a dweight summed in bf16 would drop what
    is below 1/256 of it.
    """
    if out.is_cuda and (a.dtype, out.dtype) == (torch.bfloat16, torch.float32):
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta)

def takes_triton(head: Head) -> bool:
    """`top_k` and fp64 stay in PyTorch on every device."""
    on_device = head.hidden.is_cuda or INTERPRET
    return HAVE_TRITON and on_device and not head.top_k and head.weight.dtype != torch.float64

def sweep(head: Head, pull: Callable | None, need_hidden: bool = True, need_weight: bool = True) -> tuple:
    """
    The one loop over chunks of rows. `pull(stats [3, n], rows)` answers a chunk's statistics with the
    loss's derivative [3, n] by them. Without it the sweep is forward only and keeps nothing.

    Returns stats [3, N], dhidden [N, D] and dweight [V, D], still in the dtype it was summed in; None for
    what is not needed.
    """
    hidden, targets, V, taught = head.hidden, head.targets, head.vocab, head.teacher_hidden is not None
    live_s, live_t = head.weight[:V], head.teacher_weight[:V] if taught else None     # no padding rows
    fused, scale = takes_triton(head), 1 / head.temperature
    stats_of, grads_of = (triton_stats, triton_grads) if fused else (torch_stats, torch_grads)
    like = dict(dtype=stats_dtype(head.weight), device=hidden.device)

    width = -(-V // 16) * 16 if fused else V
    n = CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (width * like["dtype"].itemsize)
    n = max(1, min(n - n % 128 if n > 128 else n, len(hidden)))             # whole tiles for the matmuls
    buffers = [torch.empty(n, width, **like)[:, :V] if used else None for used in (True, taught, not fused)]

    stats = torch.empty(3, len(hidden), **like)
    dhidden = torch.empty_like(hidden) if pull and need_hidden else None
    dweight = torch.zeros(head.weight.shape, **like) if pull and need_weight else None
    for start in range(0, len(hidden), n):
        rows = slice(start, min(start + n, len(hidden)))
        zs, zt, spare = (None if x is None else x[:rows.stop - start] for x in buffers)       # [n, V]
        matmul(hidden[rows], live_s.T, out=zs, alpha=scale)
        if taught:
            matmul(head.teacher_hidden[rows], live_t.T, out=zt, alpha=scale)
        stats[:, rows], saved = stats_of(zs, zt, spare, targets[rows], head)
        if pull is None:
            continue
        dz = grads_of(saved, targets[rows], pull(stats[:, rows], rows) * scale, head)          # [n, V]
        if need_hidden:
            part = torch.empty(len(dz), hidden.shape[1], **like)
            matmul(dz, live_s, out=part)
            dhidden[rows] = part
        if need_weight:
            matmul(dz.T, hidden[rows], out=dweight[:V], beta=1.0)
    return stats, dhidden, dweight

# ----------------------------------------------------------------------------------------- the two functions

def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
                teacher_weight: Tensor | None = None, kl: str = "reverse", temperature: float = 1.0,
                jsd_weight: float = 0.5, top_k: int = 0, vocab: int = 0) -> TokenStats:
    """
    Log-prob, entropy and divergence of N tokens, without [N, V] logits.

    hidden [N, D], weight [V, D], targets [N] int64, teacher_hidden [N, Dt], teacher_weight [Vt, Dt] ->
    three [N]. Differentiable in hidden and weight, never in the teacher. Backward makes the logits again: a
    loss that is a sum over tokens is faster through `token_loss`. Under no_grad nothing is kept.

    kl           "reverse" KL(p||q), "forward" KL(q||p), or "jsd" (1-w) KL(p||m) + w KL(q||m) where
                 w = jsd_weight, m = (1-w) p + w q: TRL's GKDTrainer.generalized_jsd_loss with beta = w
    temperature  divides both sides' logits before everything else
    top_k        takes the divergence over the teacher's k likeliest tokens, both sides renormalised; 0 is all
    vocab        how many tokens exist: rows of a weight beyond them are padding and take no part; 0 is all

    Raises ValueError, saying what was expected and found, for arguments that do not fit together.
    """
    head = checked(Head(hidden, weight, targets, teacher_hidden, teacher_weight,
                        kl, temperature, jsd_weight, top_k, vocab))
    return TokenStats(*Recompute.apply(hidden, weight, head))

def token_loss(loss_fn: Callable[[TokenStats, slice], Tensor], hidden: Tensor, weight: Tensor,
               targets: Tensor, teacher_hidden: Tensor | None = None, teacher_weight: Tensor | None = None,
               kl: str = "reverse", temperature: float = 1.0, jsd_weight: float = 0.5, top_k: int = 0,
               vocab: int = 0) -> tuple[Tensor, TokenStats]:
    """
    loss_fn(token_stats(...), slice(0, N)) and its gradient, for three student heads of work instead of four.

    loss_fn(stats, rows) is plain PyTorch: from the statistics [n] of the tokens `rows` it returns the SUM
    of their losses (a mean divides by a count that is known beforehand). We call it once per chunk, while
    the chunk's logits exist, and autograd differentiates it by three [n] vectors: the kernels never know
    the loss. Returns the loss, whose backward only hands out stored gradients, and all statistics,
    detached. Raises as `token_stats` does.
    """
    head = checked(Head(hidden, weight, targets, teacher_hidden, teacher_weight,
                        kl, temperature, jsd_weight, top_k, vocab))
    total = torch.zeros((), dtype=stats_dtype(weight), device=hidden.device)

    def pull(chunk: Tensor, rows: slice) -> Tensor:
        leaf = chunk.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_fn(TokenStats(*leaf), rows)
        total.add_(loss.detach())
        return torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)

    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.no_grad():
        if not learns:
            stats = TokenStats(*sweep(head, None)[0])
            return total + loss_fn(stats, slice(0, len(hidden))), stats
        stats, dhidden, dweight = sweep(head, pull, hidden.requires_grad, weight.requires_grad)
        dweight = None if dweight is None else dweight.to(weight.dtype)
    return HandOut.apply(hidden, weight, total, dhidden, dweight), TokenStats(*stats)

class Recompute(torch.autograd.Function):
    """`token_stats` for autograd: keeps only the inputs, and sweeps again when a gradient arrives."""
    @staticmethod
    def forward(ctx, hidden, weight, head):
        ctx.save_for_backward(hidden, weight)
        ctx.head = head
        return tuple(sweep(head, None)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        ctx.saved_tensors       # raises if hidden or weight were changed since, by an optimizer step for one
        upstream = torch.stack(upstream)
        _, dhidden, dweight = sweep(ctx.head, lambda _, rows: upstream[:, rows], *ctx.needs_input_grad[:2])
        return dhidden, None if dweight is None else dweight.to(ctx.head.weight.dtype), None

class HandOut(torch.autograd.Function):
    """A loss whose gradient was formed along with it: backward scales that and hands it out, once."""
    @staticmethod
    def forward(ctx, hidden, weight, loss, dhidden, dweight):
        ctx.grads = dhidden, dweight
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("token_loss has handed out its gradient: call it again for another backward")
        grads, ctx.grads = ctx.grads, None      # let go: autograd then takes these very tensors as .grad
        return *(g if g is None else g.mul_(upstream) for g in grads), None, None, None

def checked(head: Head) -> Head:
    """The head, detached and with `vocab` filled in. Reading the targets is the one device sync of a call."""
    hidden, weight, targets, teacher_hidden, teacher_weight = head[:5]
    show = lambda *tensors: " and ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
    match = lambda a, b: a.dim() == b.dim() == 2 and a.shape[1] == b.shape[1] and a.dtype == b.dtype
    live = head.vocab or len(weight)
    require(match(hidden, weight) and weight.dtype in (torch.float32, torch.bfloat16, torch.float64),
            "hidden [N, D] and weight [V, D] must match, in float32, bfloat16 or float64: "
            f"{show(hidden, weight)}")
    require(0 < live <= len(weight), f"vocab must lie in 1 to {len(weight)}, weight's rows: {head.vocab}")
    require(targets.shape == hidden.shape[:1] and targets.dtype == torch.int64,
            f"targets must be int64 [{len(hidden)}]: {show(targets)}")
    low, high = (int(x) for x in targets.aminmax()) if len(targets) else (0, 0)
    require(0 <= low and high < live, f"targets must lie in 0 to {live - 1}: found {low} to {high}")
    require(head.kl in ("reverse", "forward", "jsd"), f"kl must be reverse, forward or jsd: {head.kl!r}")
    require(head.temperature > 0, f"temperature must be positive: {head.temperature}")
    require(0 < head.jsd_weight < 1, f"jsd_weight must lie between 0 and 1: {head.jsd_weight}")
    require(0 <= head.top_k <= live, f"top_k must lie in 0 to {live}: {head.top_k}")
    require((teacher_hidden is None) == (teacher_weight is None), "the teacher needs hidden and weight")
    if teacher_hidden is not None:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        require(match(teacher_hidden, teacher_weight) and len(teacher_hidden) == len(hidden),
                f"teacher_hidden [{len(hidden)}, Dt] and teacher_weight [Vt, Dt] must match: "
                f"{show(teacher_hidden, teacher_weight)}")
        require(len(teacher_weight) == len(weight) or 0 < head.vocab <= len(teacher_weight),
                f"teacher_weight has {len(teacher_weight)} rows and weight {len(weight)}: vocab must say how "
                f"many tokens both know: {head.vocab}")
    return head._replace(hidden=hidden.detach(), weight=weight.detach(), targets=targets.contiguous(),
                         teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, vocab=live)

def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)

# ----------------------------------------------------------------------------------------- python kernels.py

def compile_kernels(arch: int) -> list[tuple]:
    """(kernel, kl, registers, spilled bytes, shared bytes, PTX) of each kernel; needs no GPU."""
    from triton.backends.compiler import GPUTarget
    types = dict(S="*fp32", T="*fp32", DZ="*bf16", TARGETS="*i64", STATS="*fp32", UPSTREAM="*fp32", w="fp32",
                 KL="constexpr", BLOCK="constexpr")
    rows = []
    for kernel in (row_stats, row_grads):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature)
                   if signature[name][0] == "*" or "stride" in name}
        for kl in ("none", "reverse", "forward", "jsd"):
            constants = dict(KL=kl, BLOCK=LAUNCH["BLOCK"])
            source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
            target, options = GPUTarget("cuda", arch, 32), dict(num_warps=LAUNCH["num_warps"])
            built = triton.compile(source, target, options).asm
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built["cubin"])
                file.flush()
                usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                                       capture_output=True, text=True, check=True).stdout
            registers, stack, shared, local = (int(re.search(f"{word}:(\\d+)", usage)[1])
                                               for word in ("REG", "STACK", "SHARED", "LOCAL"))
            rows.append((kernel.__name__, kl, registers, stack + local, shared, built["ptx"]))
    return rows

def example(N: int, D: int, Dt: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The five tensors of a head, with logits of standard deviation 3."""
    torch.manual_seed(0)
    normal = lambda rows, width, std: torch.randn(rows, width, dtype=dtype, device=device).mul_(std)
    return (normal(N, D, 1).requires_grad_(), normal(V, D, 3 / D ** 0.5).requires_grad_(),
            torch.randint(V, (N,), device=device), normal(N, Dt, 1), normal(V, Dt, 3 / Dt ** 0.5))

def dgrpo_loss(stats: TokenStats, rows: slice) -> Tensor:
    """The clipped surrogate and 0.1 KL of every token, with a made-up old policy and made-up advantages."""
    index = torch.arange(rows.start, rows.stop, device=stats.logp.device)
    ratio, advantage = (stats.logp - stats.logp.detach() + 0.2 * index.cos()).exp(), index.sin()
    return (0.1 * stats.kl - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()

def kl_loss(stats: TokenStats, rows: slice) -> Tensor:
    return stats.kl.sum()

def exact_grads(inputs: tuple[Tensor, ...], loss_fn: Callable, kl: str = "reverse") -> tuple[Tensor, ...]:
    """dhidden and dweight by `naive_stats` in fp64."""
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    return torch.autograd.grad(loss_fn(naive_stats(*exact, kl), slice(0, len(exact[0]))), exact[:2])

def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()

def check_gradients(device: str) -> None:
    """Prints how far the gradients are from fp64, beside how far those of eager in the same dtype are."""
    print(f"{'error against fp64':27}dhidden  dweight  (eager: dhidden  dweight)")
    for dtype in (torch.float32, torch.bfloat16):
        for kl in ("reverse", "forward", "jsd"):
            inputs, rows = example(17, 32, 48, 1500, dtype, device), slice(0, 17)
            exact = exact_grads(inputs, dgrpo_loss, kl)
            losses = token_loss(dgrpo_loss, *inputs, kl)[0], dgrpo_loss(naive_stats(*inputs, kl), rows)
            errors = [f"{error(grad, true):.1e}" for loss in losses
                      for grad, true in zip(torch.autograd.grad(loss, inputs[:2]), exact)]
            print(f"{str(dtype)[6:]:10}{kl:17}{errors[0]}  {errors[1]}          {errors[2]}  {errors[3]}")

def best_time(step: Callable, device: str) -> float:
    """The fewer seconds of two runs, after a first one that does not count."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])

def high_water(device: str) -> int:
    """The most bytes held so far: on CUDA since the last reset, on the CPU since the program began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:                    # getrusage's would, after an exec, still count what the process was before
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
    except FileNotFoundError:
        import resource     # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def contenders(device: str) -> list[tuple]:
    """(name, its loss function, the loss from the five tensors of `example`), the thriftiest first."""
    def by(stats_fn: Callable) -> Callable:
        return lambda *x: dgrpo_loss(stats_fn(*x), slice(0, len(x[0])))
    entries = [("token_loss", dgrpo_loss, lambda *x: token_loss(dgrpo_loss, *x)[0]),
               ("token_stats", dgrpo_loss, by(token_stats)), ("eager", dgrpo_loss, by(naive_stats))]
    if device == "cpu":
        return entries
    entries += [("torch.compile", dgrpo_loss, by(torch.compile(naive_stats))),
                ("token_loss, KL only", kl_loss, lambda *x: token_loss(kl_loss, *x)[0])]
    try:                    # both of Liger's return the mean over tokens; beta = 1 is the reverse KL
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        print("liger-kernel is not installed: its losses are left out")
        return entries
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    by_row = LigerFusedLinearJSD(jsd_beta=1.0)
    return entries + [
        ("Liger chunked, KL only", kl_loss, lambda h, w, y, th, tw: len(h) * chunked(h, w, th, tw, y)),
        ("Liger Triton, KL only", kl_loss, lambda h, w, y, th, tw: len(h) * by_row(h, w, th, tw, None))]

def benchmark(device: str) -> None:
    """Times forward and backward. `share`: the rate of 3 student + 1 teacher heads over a plain matmul's."""
    cuda, V = device == "cuda", 151936
    D, widths, sizes, dtype = ((2048, (4096, 5120), (1024, 2048, 8192, 32768), torch.bfloat16) if cuda else
                               (256, (512,), (256, 1024), torch.float32))
    square = torch.randn(2, 4096, 4096, dtype=dtype, device=device)
    rate = 2 * 4096 ** 3 / best_time(lambda: square[0] @ square[1], device)
    print(f"a square matmul runs at {rate / 1e12:.2f} TFLOP/s; V = {V}, D = {D}, {str(dtype)[6:]}")
    print(f"{'':22}    Dt      N         ms  TFLOP/s  share  MB over inputs and gradients  error of dhidden")
    water = 0
    for Dt in widths:
        for name, loss_fn, contender in contenders(device):
            for N in sizes if cuda or name == "token_loss" else sizes[-1:]:
                inputs = example(N, D, Dt, V, dtype, device)
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                water = high_water(device) if cuda or not water else water
                step = lambda: torch.autograd.grad(contender(*inputs), inputs[:2])
                try:
                    seconds = best_time(step, device)
                    held = high_water(device) - water - sum(x.nbytes for x in inputs[:2])
                    found = step()[0][:32] if cuda else None
                except torch.OutOfMemoryError:
                    print(f"{name:22} {Dt:5} {N:6} out of memory")
                    continue
                speed = 2 * N * V * (3 * D + Dt) / seconds
                print(f"{name:22} {Dt:5} {N:6} {seconds * 1e3:10.1f} {speed / 1e12:8.2f} {speed / rate:6.0%} "
                      f"{held / 1e6:29.0f}", end="")
                first = [x if len(x) == V else x[:32] for x in inputs]      # rows of dhidden are independent
                print(f"  {error(found, exact_grads(first, loss_fn)[0]):16.1e}" if cuda else "")
                del inputs, first, found        # before the next are made, or both would count

def main() -> None:
    global INTERPRET
    INTERPRET = "--interpret" in sys.argv                   # the call that we make below
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if INTERPRET:
        return check_gradients("cpu")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    version = triton.__version__ if HAVE_TRITON else "not installed"
    print(f"{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}, triton {version}\n")
    if HAVE_TRITON:
        print("registers, spilled and shared bytes on    sm_80        sm_90        sm_100")
        for builds in zip(*map(compile_kernels, (80, 90, 100))):
            usage = "".join(f"{build[2]:5} {build[3]} {build[4]:<6}" for build in builds)
            print(f"{builds[0][0]:14} {builds[0][1]:23}{usage}")
    print(f"\n{'CUDA' if device == 'cuda' else 'no CUDA here: the PyTorch path'}")
    check_gradients(device)
    if device == "cpu" and HAVE_TRITON:
        print("\nno CUDA here: the Triton kernels, in the interpreter")
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, __file__, "--interpret"], env=environment, check=True)
    print()
    benchmark(device)

if __name__ == "__main__":
    main()
