"""
The fused head: hidden states in; per-token log-prob, entropy and KL out; and back; no [N, V] logits in full.
"""
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = {"cpu": 80 << 20, "cuda": 400 << 20}     # of one logits buffer: 138 / 690 rows at V = 151,936, fp32

class TokenStats(NamedTuple):
    """What a loss may ask of each of the N tokens; vectors [N], fp32 (fp64 where the inputs are)."""
    logp: Tensor        # log p(target)
    entropy: Tensor     # - sum_v p_v log p_v
    kl: Tensor          # divergence of student p and teacher q, 0 without a teacher

class Head(NamedTuple):
    """The checked arguments of `token_stats`, detached."""
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    kl: str
    temperature: float
    jsd_weight: float
    top_k: int
    vocab: int

# ----------------------------------------------------------------------------------------------- the specification

def naive_stats(hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
                teacher_weight: Tensor | None = None, kl: str = "reverse", temperature: float = 1.0,
                jsd_weight: float = 0.5, top_k: int = 0, vocab: int = 0) -> TokenStats:
    """What `token_stats` computes, written the obvious way: autograd over [N, V] tensors. Tests and benchmarks only."""
    vocab = vocab or len(weight)
    zs = (hidden @ weight[:vocab].T).to(accumulate_dtype(weight)) / temperature                 # [N, V]
    logps = F.log_softmax(zs, -1)
    logp, entropy = logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
    if teacher_hidden is None:
        return TokenStats(logp, entropy, torch.zeros_like(logp))
    zt = (teacher_hidden.detach() @ teacher_weight.detach()[:vocab].T).to(zs.dtype) / temperature
    if top_k:
        zt, index = zt.topk(top_k)
        logps = F.log_softmax(zs.gather(1, index), -1)
    logqs = F.log_softmax(zt, -1)
    p, q = logps.exp(), logqs.exp()
    if kl == "reverse":
        return TokenStats(logp, entropy, (p * (logps - logqs)).sum(-1))
    if kl == "forward":
        return TokenStats(logp, entropy, (q * (logqs - logps)).sum(-1))
    logms = torch.logaddexp(logps + math.log(1 - jsd_weight), logqs + math.log(jsd_weight))
    jsd = (1 - jsd_weight) * p * (logps - logms) + jsd_weight * q * (logqs - logms)
    return TokenStats(logp, entropy, jsd.sum(-1))

# ------------------------------------------------------------------------------------------------- rows in PyTorch

def divergence(logps: Tensor, logqs: Tensor, p: Tensor, kl: str, w: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """
    Divergence of student p and teacher q per row [n], and, if `slope`, its derivative by the student's logits.
    Inputs [n, V] (or [n, k]); logqs is overwritten.

        reverse  KL(p||q) = sum p (log p - log q)      d/dz = p (log p - log q - KL)
        forward  KL(q||p) = sum q (log q - log p)      d/dz = p - q
        jsd      w KL(q||m) + (1-w) KL(p||m),  m = (1-w) p + w q
                                                       d/dz = (1-w) p (log p - log m - KL(p||m))
    """
    if kl == "reverse":
        ratio = torch.sub(logps, logqs, out=logqs).mul_(p)                          # p (log p - log q)
        value = ratio.sum(-1)
        return value, ratio.addcmul_(p, -value[:, None]) if slope else None
    q = logqs.exp()
    if kl == "forward":
        return logqs.sub_(logps).mul_(q).sum(-1), torch.sub(p, q, out=q) if slope else None
    logms = torch.logaddexp(logps + math.log(1 - w), logqs + math.log(w))           # stable where q / p overflows
    ratio = (logps - logms).mul_(p)
    kl_p, kl_q = ratio.sum(-1), logqs.sub_(logms).mul_(q).sum(-1)
    return (1 - w) * kl_p + w * kl_q, ratio.addcmul_(p, -kl_p[:, None]).mul_(1 - w) if slope else None

def torch_stats(zs: Tensor, zt: Tensor | None, spare: Tensor, targets: Tensor, head: Head, slope: bool) -> tuple:
    """Statistics of a chunk of logits [n, V], overwritten, and what `torch_grads` needs of it."""
    if head.temperature != 1:
        zs.div_(head.temperature)
    logps = torch.log_softmax(zs, -1, out=zs)
    p = torch.exp(logps, out=spare)
    logp = logps.gather(1, targets[:, None])[:, 0]
    kl, kl_slope, index = torch.zeros_like(logp), None, None
    if zt is not None:
        if head.temperature != 1:
            zt.div_(head.temperature)
        if head.top_k:
            zt, index = zt.topk(head.top_k)
            pair = F.log_softmax(logps.gather(1, index), -1), F.log_softmax(zt, -1)
            kl, kl_slope = divergence(*pair, pair[0].exp(), head.kl, head.jsd_weight, slope)
        else:
            kl, kl_slope = divergence(logps, torch.log_softmax(zt, -1, out=zt), p, head.kl, head.jsd_weight, slope)
    plogp = logps.mul_(p)
    stats = TokenStats(logp, -plogp.sum(-1), kl)
    return stats, (p, plogp, kl_slope, index, stats.entropy)

def torch_grads(saved: tuple, targets: Tensor, upstream: TokenStats, head: Head) -> Tensor:
    """d(loss) / d(logits) [n, V] of a chunk from d(loss) / d(logp, entropy, kl), each [n] or None."""
    p, plogp, kl_slope, index, entropy = saved
    g_logp, g_entropy, g_kl = (None if g is None else g[:, None] / head.temperature for g in upstream)   # [n, 1]
    g_kl = g_kl if head.teacher_hidden is not None else None
    pull = torch.zeros_like(p[:, :1]) if g_logp is None else -g_logp
    if g_entropy is not None:                               # dH/dz = -p (log p + H)
        pull = pull - g_entropy * entropy[:, None]
    dz = p.mul_(pull)                                       # dlogp/dz = 1[v = target] - p
    if g_entropy is not None:
        dz.addcmul_(plogp, -g_entropy)
    if g_kl is not None and index is None:
        dz.addcmul_(kl_slope, g_kl)
    elif g_kl is not None:
        dz.scatter_add_(1, index, kl_slope * g_kl)
    if g_logp is not None:
        dz.scatter_add_(1, targets[:, None], g_logp)
    return dz

# -------------------------------------------------------------------------------------------------- the chunk loop

def accumulate_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32

def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in out's dtype, accumulated there: bf16 operands give fp32 logits that never were rounded."""
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

def sweep(head: Head, upstream: Callable | None, need_hidden: bool, need_weight: bool) -> tuple:
    """
    The one loop over chunks of rows. `upstream(stats, rows)` answers a chunk's statistics with the derivative of the
    loss by each of them; without it the sweep is forward only. Returns stats, dhidden [N, D], dweight [V, D].
    """
    hidden, weight, targets = head.hidden, head.weight, head.targets
    dtype, live, taught = accumulate_dtype(weight), weight[:head.vocab], head.teacher_hidden is not None
    n = max(1, min(len(hidden), CHUNK_BYTES[hidden.device.type] // (head.vocab * dtype.itemsize)))
    work = [torch.empty(n, head.vocab, dtype=dtype, device=hidden.device) if used else None for used in (True, taught, True)]
    stats = TokenStats(*torch.zeros(3, len(hidden), dtype=dtype, device=hidden.device))
    dhidden = torch.empty_like(hidden) if upstream and need_hidden else None
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if upstream and need_weight else None
    for start in range(0, len(hidden), n):
        rows = slice(start, min(start + n, len(hidden)))
        zs, zt, spare = (buffer if buffer is None else buffer[:rows.stop - start] for buffer in work)
        matmul(hidden[rows], live.T, out=zs)
        if taught:
            matmul(head.teacher_hidden[rows], head.teacher_weight[:head.vocab].T, out=zt)
        chunk, saved = torch_stats(zs, zt, spare, targets[rows], head, slope=upstream is not None)
        for whole, part in zip(stats, chunk):
            whole[rows] = part
        if upstream is None:
            continue
        dz = torch_grads(saved, targets[rows], upstream(chunk, rows), head).to(weight.dtype)
        if need_hidden:
            torch.mm(dz, live, out=dhidden[rows])
        if need_weight:
            dweight[:head.vocab].addmm_(dz.T.to(dtype), hidden[rows].to(dtype))
    return stats, dhidden, dweight if dweight is None else dweight.to(weight.dtype)

# ---------------------------------------------------------------------------------------------------- two front ends

def checked(hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
            kl: str, temperature: float, jsd_weight: float, top_k: int, vocab: int) -> Head:
    """Refuses what would otherwise fail late or give a wrong number; the teacher never takes a gradient."""
    def require(ok: bool, message: str):
        if not ok:
            raise ValueError(message)
    shape = lambda t: list(t.shape)
    require(hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
            f"hidden must be [N, D] and weight [V, D], got {shape(hidden)} and {shape(weight)}")
    require(hidden.dtype == weight.dtype and weight.dtype in (torch.float32, torch.bfloat16, torch.float64),
            f"hidden and weight must share one of float32, bfloat16, float64, got {hidden.dtype} and {weight.dtype}")
    require((teacher_hidden is None) == (teacher_weight is None), "give both teacher_hidden and teacher_weight, or neither")
    require(kl in ("reverse", "forward", "jsd"), f"kl must be reverse, forward or jsd, got {kl!r}")
    require(temperature > 0, f"temperature must be positive, got {temperature}")
    require(0 < jsd_weight < 1, f"jsd_weight must lie between 0 and 1, got {jsd_weight}")
    require(0 <= vocab <= len(weight), f"vocab must be at most the weight's {len(weight)} rows, got {vocab}")
    vocab = vocab or len(weight)
    require(targets.dtype == torch.int64 and shape(targets) == [len(hidden)],
            f"targets must be int64 [{len(hidden)}], got {targets.dtype} {shape(targets)}")
    if len(targets):
        low, high = (int(x) for x in targets.aminmax())
        require(0 <= low and high < vocab, f"targets must lie in [0, {vocab}), got {low} to {high}")
    if teacher_hidden is not None:
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        require(teacher_hidden.dim() == 2 and teacher_weight.dim() == 2 and len(teacher_hidden) == len(hidden)
                and teacher_hidden.shape[1] == teacher_weight.shape[1],
                f"teacher_hidden must be [{len(hidden)}, Dt] and teacher_weight [Vt, Dt], got {shape(teacher_hidden)} "
                f"and {shape(teacher_weight)}")
        require(teacher_hidden.dtype == teacher_weight.dtype,
                f"teacher_hidden and teacher_weight must share a dtype, got {teacher_hidden.dtype} and {teacher_weight.dtype}")
        require(len(teacher_weight) >= vocab, f"the teacher's head has {len(teacher_weight)} rows, the student's vocabulary "
                f"{vocab}: give vocab, the number of tokens both know")
        require(0 <= top_k <= vocab, f"top_k must lie in [0, {vocab}], got {top_k}")
    return Head(hidden.detach(), weight.detach(), targets, teacher_hidden, teacher_weight,
                kl, temperature, jsd_weight, top_k, vocab)

class Recompute(torch.autograd.Function):
    """token_stats under autograd: keeps the inputs, and sweeps a second time when the gradient arrives."""
    @staticmethod
    def forward(ctx, hidden, weight, head):
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)
        ctx.head = head
        return tuple(sweep(head, None, False, False)[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        ctx.saved_tensors           # raises if hidden or weight were changed in place meanwhile
        part = lambda stats, rows: TokenStats(*(None if g is None else g[rows] for g in upstream))
        need_hidden, need_weight, _ = ctx.needs_input_grad
        return *sweep(ctx.head, part, need_hidden, need_weight)[1:], None

class HandOut(torch.autograd.Function):
    """A loss whose gradient was formed together with it: backward only scales and hands out."""
    @staticmethod
    def forward(ctx, hidden, weight, loss, dhidden, dweight):
        ctx.grads = dhidden, dweight
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("the gradient of token_loss was handed out already: call token_loss again")
        grads, ctx.grads = ctx.grads, None      # let go, so that autograd may keep these very tensors as .grad
        return *(g if g is None else g.mul_(upstream) for g in grads), None, None, None

def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
                teacher_weight: Tensor | None = None, kl: str = "reverse", temperature: float = 1.0,
                jsd_weight: float = 0.5, top_k: int = 0, vocab: int = 0) -> TokenStats:
    """Per-token statistics of a language-model head, differentiable in `hidden` and `weight`."""
    head = checked(hidden, weight, targets, teacher_hidden, teacher_weight, kl, temperature, jsd_weight, top_k, vocab)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return TokenStats(*Recompute.apply(hidden, weight, head))
    with torch.no_grad():
        return sweep(head, None, False, False)[0]

def token_loss(loss_fn: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
               teacher_weight: Tensor | None = None, kl: str = "reverse", temperature: float = 1.0,
               jsd_weight: float = 0.5, top_k: int = 0, vocab: int = 0) -> tuple[Tensor, TokenStats]:
    """loss_fn(token_stats(...), slice(0, N)) with its gradient formed on the way: no logits are computed twice."""
    head = checked(hidden, weight, targets, teacher_hidden, teacher_weight, kl, temperature, jsd_weight, top_k, vocab)
    total = torch.zeros((), dtype=accumulate_dtype(weight), device=hidden.device)

    def upstream(stats: TokenStats, rows: slice) -> TokenStats:
        leaves = TokenStats(*(x.detach().requires_grad_() for x in stats))
        with torch.enable_grad():
            loss = loss_fn(leaves, rows)
        total.add_(loss.detach())
        if not loss.requires_grad:              # a chunk of constants, such as a fully masked one
            return TokenStats(None, None, None)
        return TokenStats(*torch.autograd.grad(loss, leaves, allow_unused=True))

    learn = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.no_grad():
        if not learn:
            stats = sweep(head, None, False, False)[0]
            return total + loss_fn(stats, slice(0, len(hidden))), stats
        stats, dhidden, dweight = sweep(head, upstream, hidden.requires_grad, weight.requires_grad)
    return HandOut.apply(hidden, weight, total, dhidden, dweight), stats
