"""
Supervised fine-tuning: the cold start (paper, section 2.1 and Eq. 2).

    L = - 1/n  sum over all completion tokens of the batch of  log pi(o_t | p, o_<t)

What differs from the usual script:
  1. n counts the target tokens of the whole batch, so the gradient is the same however the batch is cut into streams.
     A mean per stream, averaged afterwards, would favour tokens of sparse streams.
  2. Consecutive examples on one document share its tokens: eight questions on a book cost one pass over the book.
  3. Only completion tokens meet the head; logits of a long prompt would be its largest tensor, and are of no use.

    python sft.py                              the laptop's cold start; `python recipe.py --until data` makes its files
    python sft.py --model DIR --data chat.jsonl --out out/mine
"""
import math, os, time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from kernels import token_loss
from model import Pack, UserError, adamw, check_flags, load_student, lr_at, pick_device, run, save, split_by_size, start_run
from rollout import data_order, demonstration, prompt_ids, read_examples


@dataclass
class Config:
    """Fine-tune a checkpoint on demonstrations."""
    model: str = "out/base"             # checkpoint to start from
    data: str = "out/data/sft.jsonl"    # examples with demonstrations, one JSON object per line
    response_field: str = "response"    # the field that holds the demonstration
    out: str = "out/sft"                # where the checkpoint and metrics.jsonl go
    ctx: int = 640                      # tokens of prompt and completion at most
    batch: int = 12                     # documents per step, each with all questions on it
    micro: int = 8192                   # tokens of the largest stream; smaller needs less memory, same gradient
    steps: int = 60                     # optimizer steps
    lr: float = 1e-3                    # learning rate (paper: 1e-5)
    warmup: int = 10                    # steps of linear warm-up
    schedule: str = "constant"          # constant, or cosine down to a tenth
    weight_decay: float = 0.01          # AdamW's
    clip: float = 1.0                   # largest norm of the gradient
    seed: int = 0                       # order of the data


def sft_loss(logp, count):
    """-sum log pi / count. logp [n] of a part of the batch's target tokens, count of all of them (Eq. 2, as a mean)."""
    return -logp.sum() / count


def load_demonstrations(cfg, tokenizer):
    """Runs of consecutive examples on one document -> [[(prompt_ids, completion_ids), ...], ...]."""
    runs, before = [], None
    for example in read_examples(cfg.data, cfg.response_field):
        completion = tokenizer.completion(demonstration(example, cfg.response_field))
        prompt = prompt_ids(tokenizer, example, cfg.ctx, room=len(completion))
        if not example.get("document") or example["document"] != before:
            runs.append([])
        runs[-1].append((prompt, completion))
        before = example.get("document")
    return runs


def shared_document(examples):
    """Examples on one document as one entry of a pack -> (prefix, branches, silent): what their prompts have in common,
    what follows it in each, and how many tokens of that still belong to the prompt and carry no loss."""
    prompts = [prompt for prompt, _ in examples]
    prefix = os.path.commonprefix(prompts)  # of lists of ids, in spite of its name
    return (prefix, [prompt[len(prefix):] + completion for prompt, completion in examples],
            [len(prompt) - len(prefix) for prompt in prompts])


def main(cfg):
    check_flags(cfg, ["batch", "micro"], schedule=("constant", "cosine"))
    device = pick_device()
    model, tokenizer = load_student(cfg.model, device)
    runs = load_demonstrations(cfg, tokenizer)
    log = start_run(cfg, "sft")
    optimizer = adamw(model, cfg.lr, cfg.weight_decay)

    bar = tqdm(range(cfg.steps), desc=f"{'sft':8} {cfg.out}")
    for step in bar:
        start = time.time()
        batch = [shared_document(runs[i]) for i in data_order(len(runs), cfg.batch, step, cfg.seed)]
        sizes = [len(prefix) + sum(map(len, branches)) for prefix, branches, _ in batch]
        count = sum(len(b) - skip for _, branches, silent in batch for b, skip in zip(branches, silent))
        optimizer.param_groups[0]["lr"] = lr_at(step, cfg)
        total = 0.0
        for part in split_by_size(batch, sizes, cfg.micro):
            pack = Pack.build([(prefix, branches) for prefix, branches, _ in part], device, [silent for *_, silent in part])
            hidden = model(pack)[pack.rows]                                                          # [N, D]
            loss, _ = token_loss(lambda stats, rows: sft_loss(stats.logp, count),
                                 hidden, model.head_weight, pack.targets, vocab=model.n_vocab)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(total):
            raise UserError(f"the loss is {total} at step {step}: lower --lr")
        seconds = time.time() - start
        log(dict(step=step, loss=total, grad_norm=norm, lr=lr_at(step, cfg), examples=sum(len(b) for _, b, _ in batch),
                 target_tokens=count, tokens=sum(sizes), tokens_per_second=sum(sizes) / seconds, seconds=seconds))
        bar.set_postfix_str(f"loss {total:.3f}")
    save(cfg.out, model, tokenizer)


if __name__ == "__main__":
    run(main, Config)
