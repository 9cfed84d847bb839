"""
Supervised fine-tuning: the cold start (paper, section 2.1 and Eq. 2).

    L = - 1/n  sum over all completion tokens of the batch of  log pi(o_t | p, o_<t)

What differs from the usual script:
  1. n counts the target tokens of the whole batch, so the gradient is the same however the batch is cut into
     streams. A mean per stream, averaged afterwards, would favour tokens of sparse streams.
  2. Consecutive examples on one document share its tokens:
     eight questions on a book cost one pass over the book.
  3. Only completion tokens meet the head;
     logits of a long prompt would be its largest tensor, and are of no use.

    python sft.py    the laptop's cold start; `python recipe.py --until data` makes its files
    python sft.py --model DIR --data chat.jsonl --out out/mine
"""
import math, os, sys, time
from dataclasses import dataclass

import numpy as np

from kernels import token_loss
from model import (Pack, Run, UserError, adamw, add_up, check_context, check_flags, init, load_student,
                   my_streams, plan, rank, run)
from rollout import data_order, demonstration, prompt_ids, read_examples, usable


@dataclass
class Config:
    """Fine-tune a checkpoint on demonstrations."""
    model: str = "out/base"             # checkpoint to start from
    data: str = "out/data/sft.jsonl"    # examples with demonstrations, one JSON object per line
    response_field: str = "response"    # the field that holds the demonstration
    out: str = "out/sft"                # where the checkpoint and metrics.jsonl go
    ctx: int = 640                      # tokens of prompt and completion at most
    batch: int = 12                     # documents per step, each with all questions on it
    micro: int = 8192                   # tokens of the largest stream; smaller: less memory, same gradient
    steps: int = 60                     # optimizer steps
    lr: float = 1e-3                    # learning rate (paper: 1e-5)
    warmup: int = 10                    # steps of linear warm-up
    schedule: str = "constant"          # constant, or cosine down to a tenth
    weight_decay: float = 0.01          # AdamW's
    clip: float = 1.0                   # largest norm of the gradient
    seed: int = 0                       # order of the data
    save_every: int = 20                # steps between checkpoints to go on from
    resume: bool = True                 # go on from the newest checkpoint in --out, if there is one


def sft_loss(logp, count):
    """-sum log pi / count.
    logp [n] of a part of the batch's target tokens, count of all of them (Eq. 2, as a mean)."""
    return -logp.sum() / count


def load_demonstrations(cfg, tokenizer):
    """The examples, and the numbers of those that fit, in runs of consecutive ones on one document."""
    examples = read_examples(cfg.data, cfg.response_field)
    fits, prompts, completions = usable(examples, tokenizer, cfg.ctx, 0, cfg.response_field)
    longest = (prompts + completions).max()
    if longest > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: the longest prompt with its completion takes {longest} tokens")
    documents = examples.documents[fits]
    first = (np.diff(documents, prepend=0) != 0) | (documents == 0)  # another document than before, or none
    return examples, np.split(fits, np.flatnonzero(first)[1:])


def encode(example, tokenizer, field):
    return prompt_ids(tokenizer, example), tokenizer.completion(demonstration(example, field))


def shared_document(examples):
    """Encoded examples on one document as one entry of a pack -> (prefix, branches, silent):
    what their prompts have in common, what follows it in each, and how many tokens of that still belong
    to the prompt and carry no loss."""
    prompts = [prompt for prompt, _ in examples]
    prefix = os.path.commonprefix(prompts)  # of lists of ids, in spite of its name
    return (prefix, [prompt[len(prefix):] + completion for prompt, completion in examples],
            [len(prompt) - len(prefix) for prompt in prompts])


def main(cfg, watch=None):
    """watch(step, model, tokenizer) is called every --save-every steps, see model.Run."""
    check_flags(cfg, schedule=("constant", "cosine"))
    device, this = init(), Run(cfg, "sft", watch)
    if this.finished:
        return
    model, tokenizer = load_student(this.source, device)
    check_context(cfg.ctx, model.config)
    examples, runs = load_demonstrations(cfg, tokenizer)
    needed = plan(model, cfg, device)
    this.begin(model, tokenizer, adamw(model, cfg.lr, cfg.weight_decay))
    if rank() == 0:
        print(needed, file=sys.stderr)

    for step in this.steps():
        began = time.time()
        chosen = [runs[i] for i in data_order(len(runs), cfg.batch, step, cfg.seed)]
        batch = [shared_document([encode(examples[i], tokenizer, cfg.response_field) for i in members])
                 for members in chosen]
        sizes = [(len(prefix), list(map(len, branches))) for prefix, branches, _ in batch]
        count = sum(len(b) - skip for _, branches, silent in batch for b, skip in zip(branches, silent))
        sums, suspects = dict(loss=0.0), []
        for part in my_streams(sizes, cfg.micro):
            pack = Pack.build([(batch[g][0], [batch[g][1][i] for i in members]) for g, members in part],
                              device, silent=[[batch[g][2][i] for i in members] for g, members in part])
            hidden = model(pack)[pack.rows]                                                          # [N, D]
            loss, _ = token_loss(lambda stats, rows: sft_loss(stats.logp, count),
                                 hidden, model.head_weight, pack.targets, vocab=model.n_vocab)
            loss.backward()
            sums["loss"] += loss.item()
            if not math.isfinite(loss.item()):
                suspects += [examples[chosen[g][i]].get("id") for g, members in part for i in members]
        loss = add_up(sums)["loss"]
        updated = this.update(loss, suspects, [examples[i].get("id") for members in chosen for i in members])
        seconds, tokens = time.time() - began, sum(P + sum(lengths) for P, lengths in sizes)
        this.log(dict(loss=loss, **updated, examples=sum(len(b) for _, b, _ in batch), target_tokens=count,
                      tokens=tokens, trained_per_second=tokens / seconds, seconds=seconds))
        this.bar.set_postfix_str(f"loss {loss:.3f}")
    this.finish()


if __name__ == "__main__":
    run(main, Config)
