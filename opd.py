"""
On-policy distillation (paper, Eq. 5): the student writes,
the teacher says at every token how it would have gone on.

    L = E_{o ~ pi} [ 1/|o| sum_t KL( pi(.|p, o_<t) || pi_teacher(.|p, o_<t) ) ]

No reward is used, and no gradient flows through the sampling. With --lam 0 the completions are the data's
demonstrations instead of the student's own, and with --kl forward that is knowledge distillation (Eq. 3);
between, each prompt goes one way or the other by a coin (GKD, arXiv 2306.13649).

    python opd.py                       OPD: reverse KL over the whole vocabulary
    python opd.py --lam 0 --kl forward --data out/data/sft.jsonl --out out/kd      knowledge distillation
    python opd.py --top-k 20            KL within the teacher's 20 likeliest tokens, both renormalised
    python opd.py --kl k1               sampled token only, as a policy gradient

`diff grpo.py opd.py` shows what a reward costs: advantages, ratios and clipping are what is missing here.
"""
import math, sys, time
from dataclasses import dataclass

import numpy as np
import torch

from kernels import token_loss, token_stats
from model import (Pack, Run, UserError, adamw, add_up, check_context, check_flags, init, load_student,
                   load_teacher, my_streams, on_device, plan, rank, run, share_out, whole)
from rollout import Completion, data_order, demonstration, generate, prompt_ids, read_examples, usable


@dataclass
class Config:
    """Distillation from a teacher on the student's own completions."""
    model: str = "out/sft"              # checkpoint to start from
    teacher: str = "out/teacher"        # checkpoint to learn from
    data: str = "out/data/rl.jsonl"     # examples, one JSON object per line; --lam < 1 needs demonstrations
    response_field: str = "response"    # the field that holds the demonstration
    out: str = "out/opd"                # where the checkpoint and metrics.jsonl go
    ctx: int = 640                      # tokens of prompt and completion at most
    max_new: int = 128                  # tokens of a completion at most
    batch: int = 8                      # prompts per step
    group: int = 8                      # completions of each prompt
    micro: int = 16384                  # tokens of the largest stream; smaller: less memory, same gradient
    teacher_offload: bool = False       # keep the teacher in CPU memory while it is not reading
    steps: int = 60                     # rollouts
    lr: float = 3e-4                    # learning rate (paper: 1e-6)
    warmup: int = 5                     # steps of linear warm-up
    schedule: str = "constant"          # constant, or cosine down to a tenth
    clip: float = 1.0                   # largest norm of the gradient
    temperature: float = 1.0            # of sampling, and of both models in the KL
    lam: float = 1.0                    # share of prompts completed by the student; 0: demonstrations only
    kl: str = "reverse"                 # reverse, forward, jsd (whole vocabulary); k2, k1 (sampled token)
    jsd_weight: float = 0.5             # weight of the teacher in jsd's mixture
    top_k: int = 0                      # > 0: KL within the teacher's so many likeliest tokens, renormalised
    seed: int = 0                       # order of the data and sampling noise
    save_every: int = 20                # steps between checkpoints to go on from
    resume: bool = True                 # go on from the newest checkpoint in --out, if there is one


# ----------------------------------------------------------------------------------------------------- losses

def token_weights(lengths):
    """1 / (|o_i| G_b B) for each completion: a mean over its tokens, over the G_b completions of its prompt,
    over B prompts.

    lengths [[tokens of each completion], ...], one list a prompt -> [sum G_b]. A prompt that --lam gives its
    one demonstration then weighs as much as one with several completions of the student's own."""
    return torch.tensor([1.0 / (max(n, 1) * len(group) * len(lengths)) for group in lengths for n in group])


def distill_loss(divergence, weight):
    """sum_t weight_t KL_t, both [n]."""
    return (weight * divergence).sum()


def sampled_divergence(logp, logp_teacher, kind):
    """What stands for the reverse KL when only the sampled token is known; all [n].

    k2   (log pi - log pi_teacher)^2 / 2: a loss whose expected gradient is that of the reverse KL
    k1   log pi - log pi_teacher as the cost of the sampled token: a policy gradient, none through the cost
    """
    difference = logp - logp_teacher
    return difference.square() / 2 if kind == "k2" else difference.detach() * (logp - logp.detach()).exp()


# ------------------------------------------------------------------------------------------------------- main

def check(cfg):
    check_flags(cfg, kl=("reverse", "forward", "jsd", "k1", "k2"),
                schedule=("constant", "cosine"))
    if not 0 <= cfg.lam <= 1:
        raise UserError(f"--lam {cfg.lam}: a share lies between 0 and 1")
    if cfg.kl in ("k1", "k2") and (cfg.lam < 1 or cfg.top_k):
        raise UserError(f"--kl {cfg.kl} looks at sampled tokens only: it needs --lam 1 and no --top-k")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature {cfg.temperature}: must be positive")
    if not 0 < cfg.jsd_weight < 1:
        raise UserError(f"--jsd-weight {cfg.jsd_weight}: must lie between 0 and 1; "
                        "at the ends use --kl forward or reverse")


def main(cfg, watch=None):
    """watch(step, model, tokenizer) is called every --save-every steps, see model.Run."""
    check(cfg)
    device, this = init(), Run(cfg, "opd", watch)
    if this.finished:
        return
    model, tokenizer = load_student(this.source, device)
    teacher = load_teacher(cfg.teacher, device, tokenizer, cfg.teacher_offload)
    check_context(cfg.ctx, model.config, teacher.config)
    field = cfg.response_field if cfg.lam < 1 else None
    examples = read_examples(cfg.data, field)
    if not 0 <= cfg.top_k <= model.n_vocab:
        raise UserError(f"--top-k {cfg.top_k}: must lie between 0 and the {model.n_vocab} tokens there are")
    fits, sizes, written = usable(examples, tokenizer, cfg.ctx, cfg.max_new, field)
    longest = (sizes + np.maximum(written, cfg.max_new)).max()
    if longest > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: the longest prompt with one completion can take "
                        f"{longest} tokens")
    needed = plan(model, cfg, device, teacher)
    this.begin(model, tokenizer, adamw(model, cfg.lr))
    if rank() == 0:
        print(needed, file=sys.stderr)
    sampled = cfg.kl in ("k1", "k2")
    options = dict(temperature=cfg.temperature, vocab=model.n_vocab)
    if not sampled:
        options |= dict(kl=cfg.kl, jsd_weight=cfg.jsd_weight, top_k=cfg.top_k)

    for step in this.steps():
        # completions: the student's own, or with probability 1 - lam the demonstration
        times = [time.time()]
        chosen = [int(fits[i]) for i in data_order(len(fits), cfg.batch, step, cfg.seed)]
        drawn = {i: examples[i] for i in chosen}
        prompts = {i: prompt_ids(tokenizer, e) for i, e in drawn.items()}
        # numpy pads seeds with 0: (seed, step) alone would repeat the noise of the step's first completion
        own = np.random.default_rng([cfg.seed, step, cfg.batch]).random(cfg.batch) < cfg.lam         # [B]
        asked = [prompts[i] for i, mine in zip(chosen, own) if mine]
        with whole(model) as sampler:
            sampled_groups = iter(share_out(lambda mine: generate(
                sampler, [asked[j] for j in mine], cfg.group, cfg.max_new, cfg.temperature,
                stop_ids=tokenizer.stop_ids, seed=(cfg.seed, step), numbers=mine),
                [len(prompt) for prompt in asked]))
        completions = []
        for i, mine in zip(chosen, own):
            if mine:
                completions.append(next(sampled_groups))
            else:
                taught = tokenizer.completion(demonstration(drawn[i], cfg.response_field))
                completions.append([Completion(taught, [0.0] * len(taught), True)])
        everyone = [c for group in completions for c in group]
        lengths = torch.tensor([len(c.tokens) for c in everyone])                                    # [M]
        weight = token_weights([[len(c.tokens) for c in group] for group in completions])            # [M]
        weight = weight.split([len(group) for group in completions])                                # [B][G_b]

        # pack whole groups, as many into a stream as --micro allows, and let the teacher read them
        sizes = [(len(prompts[i]), [len(c.tokens) for c in group]) for i, group in zip(chosen, completions)]
        parts, streams = my_streams(sizes, cfg.micro), []
        with on_device(teacher, device), torch.no_grad():
            for part in parts:
                pack = Pack.build([(prompts[chosen[b]], [completions[b][i].tokens for i in members])
                                   for b, members in part], device)
                w = torch.cat([weight[0][:0],
                               *(weight[b][members] for b, members in part)]).to(device)[pack.seq]   # [N]
                streams.append((pack, w, teacher(pack)[pack.rows]))                    # [N, D of the teacher]
            teacher_head = teacher.head_weight.detach()  # sharded weights are whole after a pass

        # distil: all streams make one optimizer step
        times.append(time.time())
        sums, suspects = dict.fromkeys(("loss", "kl", "entropy"), 0.0), []
        for part, (pack, w, teacher_hidden) in zip(parts, streams):
            head = (model(pack)[pack.rows], model.head_weight, pack.targets)
            if sampled:
                logp_teacher = token_stats(teacher_hidden, teacher_head, pack.targets,
                                           temperature=cfg.temperature, vocab=model.n_vocab).logp
                loss, stats = token_loss(lambda stats, rows: distill_loss(
                    sampled_divergence(stats.logp, logp_teacher[rows], cfg.kl), w[rows]), *head, **options)
                kl = stats.logp - logp_teacher
            else:
                loss, stats = token_loss(lambda stats, rows: distill_loss(stats.kl, w[rows]),
                                         *head, teacher_hidden, teacher_head, **options)
                kl = stats.kl
            loss.backward()
            sums["loss"] += loss.item()
            sums["kl"] += kl.sum().item()
            sums["entropy"] += stats.entropy.sum().item()
            if not math.isfinite(loss.item()):
                suspects += [drawn[chosen[b]].get("id") for b, _ in part]
        sums = add_up(sums)
        updated = this.update(sums["loss"], suspects, [e.get("id") for e in drawn.values()])
        times.append(time.time())

        # log
        rows, tokens = int(lengths.sum()), sum(P + sum(group) for P, group in sizes)
        sampling, updating = np.diff(times).tolist()
        this.log(dict(
            loss=sums["loss"], kl=sums["kl"] / rows, entropy=sums["entropy"] / rows,
            on_policy=float(own.mean()), length=lengths.float().mean().item(),
            length_max=lengths.max().item(), truncated=sum(not c.finished for c in everyone) / len(everyone),
            **updated, tokens=tokens, seconds_sampling=sampling, seconds_update=updating,
            sampled_per_second=rows / sampling, trained_per_second=tokens / updating))
        this.bar.set_postfix_str(f"kl {sums['kl'] / rows:.3f}")
    this.finish()


if __name__ == "__main__":
    run(main, Config)
