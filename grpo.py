"""
GRPO, and with a teacher dGRPO (paper, Eq. 4 and 6): group-relative policy optimization whose KL anchor is a
stronger teacher instead of a frozen copy of the policy.

    J = E [ 1/G sum_i 1/|o_i| sum_t  min( rho_it A_i , clip(rho_it, 1-eps, 1+eps) A_i )
                                     -  beta KL( pi || pi_teacher )_it ]
    rho_it = pi(o_it | p, o_i<t) / pi_old(o_it | p, o_i<t)          A_i = (r_i - mean r_1..G) / std r_1..G

The KL is taken over the whole vocabulary at every completion token, in the loss, outside the clip. Equal
rewards throughout a group give GRPO nothing to learn from; the KL still says, token by token, what the
teacher would have written.

    python grpo.py                                          GRPO: reward alone
    python grpo.py --teacher out/teacher --out out/dgrpo    dGRPO, beta 0.5
    python grpo.py --teacher ref --beta 0.01                the classic: KL to the frozen starting point
    python grpo.py --teacher self --updates 4               KL to the policy that sampled
                                                            (with 1 update it is exactly 0)

Where the paper is silent: one update per rollout, temperature 1, truncated completions keep their reward and
loss. The loss printed at the first update is no measure of progress: with rho = 1 and centred advantages its
policy part is 0 while its gradient is not.
"""
import math, sys, time
from dataclasses import dataclass

import numpy as np
import torch

from kernels import token_loss, token_stats
from model import (Pack, Run, UserError, adamw, add_up, check_context, check_flags, gather, init,
                   load_student, load_teacher, my_streams, on_device, plan, rank, run, share_out, whole)
from rollout import (check_rewards, completion_text, data_order, generate, load_judge, prompt_ids,
                     read_examples, rewards_of, usable)


@dataclass
class Config:
    """GRPO; with --teacher, dGRPO."""
    model: str = "out/sft"              # checkpoint to start from
    teacher: str = ""                   # checkpoint of the KL's anchor, or ref, or self; empty: no KL
    data: str = "out/data/rl.jsonl"     # examples with answers, one JSON object per line
    judge: str = ""                     # checkpoint that compares answers with references (paper: Qwen3-4B)
    allow_code: bool = False            # run the programs in completions, where examples bring tests
    out: str = "out/grpo"               # where the checkpoint and metrics.jsonl go
    ctx: int = 640                      # tokens of prompt and completion at most
    max_new: int = 128                  # tokens of a completion at most
    batch: int = 8                      # prompts per step
    group: int = 8                      # completions of each prompt; the advantage compares within them
    micro: int = 16384                  # tokens of the largest stream; smaller: less memory, same gradient
    teacher_offload: bool = False       # keep the teacher in CPU memory while it is not reading
    steps: int = 60                     # rollouts
    updates: int = 1                    # optimizer steps on each rollout
    lr: float = 3e-4                    # learning rate (paper: 1e-6)
    warmup: int = 5                     # steps of linear warm-up
    schedule: str = "constant"          # constant, or cosine down to a tenth
    clip: float = 1.0                   # largest norm of the gradient
    temperature: float = 1.0            # of sampling, and of the policy that is trained
    beta: float = 0.5                   # weight of the KL to the teacher
    beta_schedule: str = "constant"     # constant (paper), or linear down to 0 after the last step
    kl_first: float = 1.0               # take the KL on this first share of every completion's tokens only
    kl: str = "reverse"                 # reverse, forward, jsd: whole vocabulary; sampled: k2, k1 (advantage)
    advantage_std: bool = True          # divide advantages by the group's standard deviation
    eps_low: float = 0.2                # the ratio is clipped at 1 - eps_low ...
    eps_high: float = 0.2               # ... and at 1 + eps_high (DAPO: 0.28)
    aggregate: str = "sequence"         # token mean by: sequence (paper), token (DAPO), constant (Dr. GRPO)
    ratio: str = "token"                # token, sequence (GSPO), or cispo (clipped ratio as constant weight)
    tis: float = 0.0                    # > 0: correct sampler-trainer differences by a ratio truncated here
    mask_truncated: bool = False        # completions cut off at max_new carry no loss
    drop_equal: bool = False            # leave out groups of equal rewards (and their KL to the teacher)
    seed: int = 0                       # order of the data and sampling noise
    save_every: int = 20                # steps between checkpoints to go on from
    resume: bool = True                 # go on from the newest checkpoint in --out, if there is one


# ----------------------------------------------------------------------------------------------------- losses

def advantages(rewards, use_std=True):
    """Group-relative advantages: rewards [B, G] -> [B, G], (r - mean) / (std + 1e-4);
    exactly 0 where all are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if use_std:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred.masked_fill(equal_rewards(rewards)[:, None], 0.0)


def equal_rewards(rewards):
    """Groups [B] whose rewards differ by no more than rounding."""
    return rewards.amax(1) - rewards.amin(1) < 1e-6


def token_weights(lengths, counted, aggregate, max_new):
    """Weight of every token, so that sum_t weight_t * x_t is the mean over the whole batch.

    lengths, counted, of one shape: tokens of each completion, and whether it carries loss; M of them do.
    -> the weight of each of its tokens, of that shape.
        sequence   1 / (|o_i| M)      every completion counts the same (GRPO, the paper)
        token      1 / sum |o_i|      every token counts the same (DAPO)
        constant   1 / (max_new M)    as `sequence`, without its preference for short right answers (Dr. GRPO)
    """
    counted = counted.float()
    completions = counted.sum().clamp(min=1)  # all of them truncated and masked: weights are 0, not NaN
    if aggregate == "sequence":
        return counted / (lengths.clamp(min=1) * completions)
    if aggregate == "token":
        return counted / (lengths * counted).sum().clamp(min=1)
    return counted / (max_new * completions)


def log_ratios(logp, logp_old, ratio, seq):
    """log rho of every token [n]; with ratio "sequence" (GSPO, arXiv 2507.18071) its mean over the token's
    completion, numbered by seq [n]."""
    log_ratio = logp - logp_old
    if ratio != "sequence":
        return log_ratio
    sums = torch.zeros(int(seq.max()) + 1 if len(seq) else 0, dtype=logp.dtype, device=logp.device)
    return (sums.index_add(0, seq, log_ratio) / seq.bincount().clamp(min=1))[seq]


def policy_loss(logp, logp_old, advantage, weight, eps_low=0.2, eps_high=0.2, ratio="token", seq=None):
    """- sum_t weight_t min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t).
    All vectors are [n], one entry a token.

    ratio "sequence" takes the ratio of the token's completion, see log_ratios;
    "cispo" (arXiv 2506.13585) is - sum_t weight_t sg(min(rho_t, 1 + eps_high)) A_t logp_t:
    no token loses its gradient."""
    rho = log_ratios(logp, logp_old, ratio, seq).exp()
    if ratio == "cispo":
        return -(weight * rho.clamp(max=1 + eps_high).detach() * advantage * logp).sum()
    return -(weight * torch.min(rho * advantage, rho.clamp(1 - eps_low, 1 + eps_high) * advantage)).sum()


def k2(logp, logp_teacher):
    """(log pi - log pi_teacher)^2 / 2 of the sampled token: its expected gradient is that of the reverse KL.

    Not offered: k1 in the loss, whose expected gradient is 0,
    and k3, whose gradient is that of the forward KL."""
    return (logp - logp_teacher).square() / 2


# ---------------------------------------------------------------------------------------------------- streams

@dataclass
class Stream:
    """A pack and what the loss wants to know of each of its N completion tokens; vectors are [N]."""
    pack: Pack
    logp_old: torch.Tensor                       # under the policy that sampled, as the sampler saw it
    advantage: torch.Tensor
    weight: torch.Tensor                         # makes sums over tokens means over the whole batch
    kl_weight: torch.Tensor                      # the same for the KL: 0 after --kl-first of a completion
    teacher_hidden: torch.Tensor | None = None   # [N, D of the teacher]
    logp_teacher: torch.Tensor | None = None     # only for k1 and k2
    logp_first: torch.Tensor | None = None       # the trainer's own value at the first update


def beta_at(step, cfg):
    return cfg.beta * (1 - step / cfg.steps if cfg.beta_schedule == "linear" else 1)


@torch.no_grad()
def build_stream(groups, advantage, weight, teacher, beta, cfg, device):
    """groups [(prompt_ids, [Completion, ...]), ...] with advantage and weight of each completion
    -> Stream."""
    pack = Pack.build([(prompt, [c.tokens for c in completions]) for prompt, completions in groups], device)
    everyone = [c for _, completions in groups for c in completions]
    logp_old = torch.tensor([x for c in everyone for x in c.logps], device=device)
    anchored = torch.tensor([t < cfg.kl_first * len(c.tokens) for c in everyone
                             for t in range(len(c.tokens))], device=device)
    weight = weight.to(device)[pack.seq]
    s = Stream(pack, logp_old, advantage.to(device)[pack.seq], weight, weight * anchored)
    if teacher is not None:
        s.teacher_hidden = teacher(pack)[pack.rows]  # one pass for all completions; only their rows are kept
        if cfg.kl in ("k1", "k2"):
            s.logp_teacher = token_stats(s.teacher_hidden, teacher.head_weight, pack.targets,
                                         temperature=cfg.temperature, vocab=teacher.n_vocab).logp
        if cfg.kl == "k1":
            s.advantage = s.advantage - beta * anchored * (logp_old - s.logp_teacher)
    return s


def stream_loss(s, stats, rows, beta, cfg, first):
    """The loss of some rows of a stream, given their statistics: a sum over tokens,
    so that it can be taken in chunks."""
    old, weight = s.logp_old[rows], s.weight[rows]
    if cfg.tis:  # pi_old is the trainer's own; the sampler's distance from it is a constant, truncated weight
        own = stats.logp.detach() if first else s.logp_first[rows]
        weight, old = weight * (own - old).exp().clamp(max=cfg.tis), own
    loss = policy_loss(stats.logp, old, s.advantage[rows], weight, cfg.eps_low, cfg.eps_high, cfg.ratio,
                       s.pack.seq[rows])
    if s.teacher_hidden is not None and cfg.kl == "k2":
        loss = loss + beta * (s.kl_weight[rows] * k2(stats.logp, s.logp_teacher[rows])).sum()
    elif s.teacher_hidden is not None and cfg.kl != "k1":
        loss = loss + beta * (s.kl_weight[rows] * stats.kl).sum()       # this line makes GRPO dGRPO
    return loss


# ------------------------------------------------------------------------------------------------------- main

def check(cfg):
    if cfg.group < 2:
        raise UserError(f"--group {cfg.group}: a completion is compared with the others of its group, "
                        "so it must be at least 2")
    if cfg.kl == "k3":
        raise UserError("--kl k3: in the loss its gradient is that of the forward KL, whatever its value; "
                        "use k2, or forward")
    check_flags(cfg, kl=("reverse", "forward", "jsd", "k1", "k2"),
                aggregate=("sequence", "token", "constant"), ratio=("token", "sequence", "cispo"),
                schedule=("constant", "cosine"), beta_schedule=("constant", "linear"))
    if not 0 <= cfg.kl_first <= 1:
        raise UserError(f"--kl-first {cfg.kl_first}: a share lies between 0 and 1")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature {cfg.temperature}: completions of a group must differ, "
                        "so it must be positive")


def main(cfg, watch=None):
    """watch(step, model, tokenizer) is called every --save-every steps, see model.Run."""
    check(cfg)
    device, this = init(), Run(cfg, "dgrpo" if cfg.teacher else "grpo", watch)
    if this.finished:
        return
    model, tokenizer = load_student(this.source, device)
    examples = read_examples(cfg.data)
    check_rewards(examples, cfg.judge, cfg.allow_code)
    fits, sizes, _ = usable(examples, tokenizer, cfg.ctx, cfg.max_new)
    longest = sizes.max() + cfg.max_new
    if longest > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: the longest prompt with one completion can take "
                        f"{longest} tokens")
    teacher = None
    if cfg.teacher and cfg.beta:
        anchor = cfg.model if cfg.teacher in ("ref", "self") else cfg.teacher
        teacher = load_teacher(anchor, device, tokenizer, cfg.teacher_offload)
    check_context(cfg.ctx, *(m.config for m in (model, teacher) if m is not None))
    judge = load_judge(cfg.judge, device) if cfg.judge else None
    needed = plan(model, cfg, device, teacher)
    this.begin(model, tokenizer, adamw(model, cfg.lr))
    if rank() == 0:
        print(needed, file=sys.stderr)
    full_kl = dict(kl=cfg.kl) if cfg.kl not in ("k1", "k2") else {}

    for step in this.steps():
        if teacher is not None and cfg.teacher == "self":
            teacher.load_state_dict(model.state_dict())

        # roll out: G completions of each prompt, and their rewards
        times, beta = [time.time()], beta_at(step, cfg)
        chosen = [int(fits[i]) for i in data_order(len(fits), cfg.batch, step, cfg.seed)]
        drawn = {i: examples[i] for i in chosen}
        prompts = {i: prompt_ids(tokenizer, e) for i, e in drawn.items()}
        with whole(model) as sampler:
            completions = share_out(lambda mine: generate(
                sampler, [prompts[chosen[b]] for b in mine], cfg.group, cfg.max_new, cfg.temperature,
                stop_ids=tokenizer.stop_ids, seed=(cfg.seed, step), numbers=mine),
                [len(prompts[i]) for i in chosen])                                                   # [B][G]
        rewards, reasons = rewards_of([drawn[i] for i in chosen for _ in range(cfg.group)],
                                      [completion_text(tokenizer, c) for group in completions for c in group],
                                      judge, cfg.allow_code)
        rewards = torch.tensor(rewards).view(cfg.batch, cfg.group)                                   # [B, G]
        lengths = torch.tensor([[len(c.tokens) for c in group] for group in completions])            # [B, G]
        finished = torch.tensor([[c.finished for c in group] for group in completions])              # [B, G]
        equal = equal_rewards(rewards)                                                               # [B]
        advantage = advantages(rewards, cfg.advantage_std)                                           # [B, G]
        counted = torch.ones_like(finished)
        if cfg.mask_truncated:
            counted &= finished
        if cfg.drop_equal:
            counted &= ~equal[:, None]
        weight = token_weights(lengths, counted, cfg.aggregate, cfg.max_new)                         # [B, G]

        # pack whole groups, as many into a stream as --micro allows, and let the teacher read them
        times.append(time.time())
        kept = counted.any(1).nonzero()[:, 0].tolist()
        sizes = [(len(prompts[chosen[b]]), lengths[b].tolist()) for b in kept]
        parts = [[(kept[g], members) for g, members in part] for part in my_streams(sizes, cfg.micro)]
        streams = []
        with on_device(teacher, device):
            for part in parts:
                groups = [(prompts[chosen[b]], [completions[b][i] for i in members]) for b, members in part]
                A, w = (torch.cat([x[0, :0], *(x[b, members] for b, members in part)])
                        for x in (advantage, weight))
                streams.append(build_stream(groups, A, w, teacher, beta, cfg, device))
            teacher_head = teacher.head_weight.detach() if teacher else None  # if sharded, whole after a pass

        # update: all streams make one optimizer step
        times.append(time.time())
        for update in range(cfg.updates):
            sums = dict.fromkeys(("loss", "kl", "kl_loss", "entropy", "clipped", "logp_diff", "rows"), 0.0)
            suspects, largest = [], 0.0
            for part, s in zip(parts, streams):
                hidden = model(s.pack)[s.pack.rows]                                                  # [N, D]
                head = (hidden, model.head_weight, s.pack.targets)
                if teacher is not None and full_kl:
                    head += (s.teacher_hidden, teacher_head)
                options = dict(temperature=cfg.temperature, vocab=model.n_vocab, **full_kl)
                if cfg.ratio == "sequence":  # couples a completion's tokens: statistics first, then the loss
                    stats = token_stats(*head, **options)
                    loss = stream_loss(s, stats, slice(None), beta, cfg, update == 0)
                else:
                    loss, stats = token_loss(
                        lambda stats, rows: stream_loss(s, stats, rows, beta, cfg, update == 0),
                        *head, **options)
                loss.backward()
                with torch.no_grad():
                    if update == 0:
                        s.logp_first = stats.logp.detach()
                    real = s.weight > 0                          # masked completions stay out of the means
                    old = s.logp_first if cfg.tis else s.logp_old
                    rho = log_ratios(stats.logp, old, cfg.ratio, s.pack.seq).exp()
                    too_high = (rho > 1 + cfg.eps_high) & ((s.advantage > 0) | (cfg.ratio == "cispo"))
                    too_low = (rho < 1 - cfg.eps_low) & (s.advantage < 0) & (cfg.ratio != "cispo")
                    difference = (s.logp_first - s.logp_old).abs()[real]
                    kl = stats.kl if s.logp_teacher is None else stats.logp - s.logp_teacher
                    sums["loss"] += loss.item()
                    sums["kl"] += kl[real].sum().item()
                    in_loss = (k2(stats.logp, s.logp_teacher) if teacher and cfg.kl == "k2"
                               else stats.kl)  # of k1, which is in the advantage: 0
                    sums["kl_loss"] += beta * (s.kl_weight * in_loss).sum().item()
                    sums["entropy"] += stats.entropy[real].sum().item()
                    sums["clipped"] += (too_high | too_low)[real].sum().item()
                    sums["logp_diff"] += difference.sum().item()
                    sums["rows"] += real.sum().item()
                    largest = max(largest, difference.max().item() if len(difference) else 0.0)
                    if not math.isfinite(loss.item()):
                        suspects += [drawn[chosen[b]].get("id") for b, _ in part]
            sums, largest = add_up(sums), max(gather(largest))
            updated = this.update(sums["loss"], suspects, [e.get("id") for e in drawn.values()])
        times.append(time.time())

        # log; of several updates the last
        rows, reward, tokens = (max(sums["rows"], 1), rewards.mean().item(),
                                sum(P + sum(group) for P, group in sizes))
        sampling, scoring, updating = np.diff(times).tolist()
        this.log(dict(
            reward=reward, reward_std=rewards.std(1).mean().item(), zero_variance=equal.float().mean().item(),
            **{f"unscored: {reason}": count for reason, count in reasons.items()},
            loss=sums["loss"], policy_loss=sums["loss"] - sums["kl_loss"], kl=sums["kl"] / rows,
            entropy=sums["entropy"] / rows, clipped=sums["clipped"] / rows,
            logp_diff=sums["logp_diff"] / rows, logp_diff_max=largest, length=lengths.float().mean().item(),
            length_max=lengths.max().item(), truncated=1 - finished.float().mean().item(), **updated,
            tokens=tokens, seconds_sampling=sampling, seconds_teacher=scoring, seconds_update=updating,
            sampled_per_second=lengths.sum().item() / sampling, scored_per_second=tokens / scoring,
            trained_per_second=cfg.updates * tokens / updating))
        this.bar.set_postfix_str(f"reward {reward:.2f}" + (f" kl {sums['kl'] / rows:.3f}" if teacher else ""))
    this.finish()


if __name__ == "__main__":
    run(main, Config)
