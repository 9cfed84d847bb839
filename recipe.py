"""
The recipe: data, a base model and a teacher, then every arm of the comparison, and one table.

    data ->  base  ->  SFT cold start  ->  GRPO  |  OPD  |  dGRPO        (and dGRPO without the cold start)
             teacher: larger, trained longer -------^-------^

Both stages see a mixture of 10 % short and 90 % long examples by tokens (paper, section 3.3), so that long-context
reasoning rises and the short-context skill stays.

The laptop run trains everything from scratch on tasks generated here. They are plain text: the same generator serves the
tiny models and Qwen3. A document is a shuffled pile of pairs ("Ada Bob.") and idle sentences; a question needs several:

    hops      follow h links through the pairs                     "Start at Ada and take three steps. Who is it?"
    latest    where a thing is that was moved about, or none       "Where is the coin now?"
    chain     write out the links one after the other              "List the next four after Ada."

Three short tasks without a document (sum, reverse, copy) stand for the skills that must not be forgotten.

    python recipe.py                                               the laptop: 2 cores, about 9 minutes
    python recipe.py --until sft                                   only what `python grpo.py` and `python opd.py` start from
    python recipe.py --student DIR --teacher DIR --train-len 8192  with checkpoints of your own
"""
import json, math, os, time
from dataclasses import dataclass

import numpy as np
import regex
import torch
from tqdm import tqdm

import grpo, opd, sft
from model import (PRESETS, QWEN_PATTERN, Log, Tokenizer, UserError, barrier, check_flags, gather, init, load,
                   new_model, rank, read_rows, run, save, tiny_tokenizer, write_file)
from model import Config as ModelConfig
from rollout import evaluate, prompt_messages, read_examples


@dataclass
class Config:
    """Data, cold start, GRPO, OPD and dGRPO, and a table that compares them."""
    out: str = "out"                # everything goes here: data, a directory per stage, results.jsonl, results.md
    student: str = ""               # checkpoint to start from; empty: train a tiny one from scratch
    teacher: str = ""               # the teacher's checkpoint; empty: train a larger tiny one
    until: str = ""                 # stop after this stage: data, base, teacher or sft
    train_len: int = 256            # prompt tokens of the long training examples
    test_len: int = 512             # a length that no stage trains on, for the table
    long_share: float = 0.9         # share of long examples in the mixture, by tokens
    base_steps: int = 800           # training of the tiny student on short texts
    teacher_steps: int = 250        # training of the tiny teacher, which starts from the base, on the mixture
    sft_steps: int = 60             # cold start
    rl_steps: int = 80              # rollouts of GRPO, OPD and dGRPO
    batch: int = 8                  # prompts per rollout
    group: int = 8                  # completions per prompt
    max_new: int = 128              # tokens of a completion at most
    micro: int = 16384              # tokens of the largest stream
    sft_lr: float = 1e-3            # learning rate of the cold start (paper: 1e-5)
    rl_lr: float = 3e-4             # learning rate of GRPO, OPD and dGRPO (paper: 1e-6)
    beta: float = 0.5               # weight of the KL to the teacher
    test_n: int = 64                # test examples per task and length
    seed: int = 0                   # data, weights and sampling
    save_every: int = 20            # steps between checkpoints to go on from
    resume: bool = True             # go on where a run in --out stopped; arms that are done are not trained again
    plot: str = ""                  # draw the metrics.jsonl files below this directory into its metrics.png, and stop


# --------------------------------------------------------------------------------------------------------------------- tasks

NAMES = "Ada Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Lee Mia Ned Ola Pam Quin Ray Sue Tom Una Val Wes Zoe".split()
THINGS = "coin lamp ring book bell drum cup fan".split()
PLACES = "Rome Oslo Lima Cairo Paris Delhi Tokyo Quito Seoul Bern Riga Accra Dakar Hanoi Kyiv Malta".split()
HEADER = "In each pair the first leads to the second:"
NUMBERS = "one two three four five six seven eight".split()
IDLE = ["The sky is clear today.", "Rain fell on the hills.", "The market opens early.", "A bell rang in the square.",
        "The river runs slow.", "Bread is on the table.", "The road goes north.", "Lamps were lit at dusk."]


def make_document(rng, budget, count):
    """A shuffled pile of facts of at most `budget` tokens, filled up with idle sentences -> (text, links).

    links: "Ada Bob." as {"Ada": "Bob"}. Names form one cycle, so that everybody leads to one and is led to by one.
    Things lead to a place, and a place to where what was there went next. count(sentence) -> its tokens."""
    def some(words, n):
        return [words[i] for i in rng.permutation(len(words))[:n]]
    names = some(NAMES, max(4, budget // 12))
    links = dict(zip(names, names[1:] + names[:1]))
    places = some(PLACES, len(PLACES))
    for thing in some(THINGS, min(len(THINGS) // 2, max(1, budget // 40))):
        stations = [thing] + [places.pop() for _ in range(min(len(places), rng.integers(1, 5)))]
        links |= dict(zip(stations, stations[1:]))
    sentences = [f"{a} {b}." for a, b in links.items()]
    room = budget - count(HEADER) - sum(count(" " + s) for s in sentences)
    while True:
        idle = IDLE[rng.integers(len(IDLE))]
        room -= count(" " + idle)
        if room < 0:
            break
        sentences.append(idle)
    return " ".join([HEADER] + [sentences[i] for i in rng.permutation(len(sentences))]), links


def ask_hops(rng, links, hops):
    """Follow so many links."""
    path = walk(links, any_of(rng, [name for name in NAMES if name in links]), hops)
    question = f"Start at {path[0]} and take {NUMBERS[hops - 1]} steps. Who is it?"
    return question, path[-1], "exact", thought(path) + f"Answer: {path[-1]}"


def ask_latest(rng, links, _):
    """Where a thing is after all that was said of it; one in four is not mentioned at all."""
    absent = rng.random() < 0.25
    thing = any_of(rng, [thing for thing in THINGS if (thing in links) != absent])
    path = walk(links, thing, len(links))
    answer = path[-1] if len(path) > 1 else "none"
    end = " stays" if len(path) > 1 else " absent"
    return f"Where is the {thing} now?", answer, "exact", thought(path, end) + f"Answer: {answer}"


def ask_chain(rng, links, hops):
    """Write out the path."""
    path = walk(links, any_of(rng, [name for name in NAMES if name in links]), hops)
    question = f"List the next {NUMBERS[hops - 1]} after {path[0]}."
    return question, path[1:], "sequence", thought(path) + f"Answer: {', '.join(path[1:])}"


def any_of(rng, words):
    return words[rng.integers(len(words))]


def walk(links, start, steps):
    path = [start]
    while path[-1] in links and len(path) <= steps:
        path.append(links[path[-1]])
    return path


def thought(path, end=None):
    """Every pair that is used is written out again before the next is looked up: each step is then one look-up in the
    context, which a small model can learn. A bare list of names is not learnt in many times the steps."""
    lines = [f"{a} {b}" for a, b in zip(path, path[1:])] + ([path[-1] + end] if end else [])
    return "<think>\n" + "".join(f"{i + 1} {line}\n" for i, line in enumerate(lines)) + "</think>\n\n"


def ask_sum(rng):
    """Add three digits from left to right."""
    a, b, c = (int(x) for x in rng.integers(1, 10, 3))
    return (f"What is {a} + {b} + {c}?", str(a + b + c), "exact",
            f"<think>\n{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}\n</think>\n\nAnswer: {a + b + c}")


def ask_reverse(rng):
    """A list, last one first."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:rng.integers(3, 6)]]
    numbered = "".join(f"{i + 1} {n}\n" for i, n in enumerate(names))
    return (f"Turn this list around: {', '.join(names)}.", names[::-1], "sequence",
            f"<think>\n{numbered}</think>\n\nAnswer: {', '.join(names[::-1])}")


def ask_copy(rng):
    """A list of words, once more: the plainest use of a context, and what the look-ups of the long tasks grow from."""
    words = [*NAMES, *THINGS, *PLACES]
    text = " ".join(words[i] for i in rng.permutation(len(words))[:rng.integers(5, 21)])
    return f"Write this again: {text}", text, "exact", f"<think>\n</think>\n\nAnswer: {text}"


LONG_TASKS = {"hops": ask_hops, "latest": ask_latest, "chain": ask_chain}
SHORT_TASKS = {"sum": ask_sum, "reverse": ask_reverse, "copy": ask_copy}


def long_examples(seed, split, n, budget, questions, max_hops, count):
    """n documents, each as the list of its examples: some questions on it. Document i depends on (seed, split, i) alone, so
    any order of access gives the same data."""
    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS.index(split), budget, i])
        document, links = make_document(rng, budget, count)
        examples = []
        for j in range(questions):
            kind = list(LONG_TASKS)[(i + j) % len(LONG_TASKS)]
            question, answer, reward, response = LONG_TASKS[kind](rng, links, int(rng.integers(2, max_hops + 1)))
            examples.append(dict(id=f"{split}-{budget}-{i}-{j}", document=document, question=question, answer=answer,
                                 source="generated", language="en", kind=kind, reward=reward, response=response))
        yield examples


def short_examples(seed, split, n):
    """n short examples, each a list of one."""
    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS.index(split), 0, i])
        kind = list(SHORT_TASKS)[i % len(SHORT_TASKS)]
        question, answer, reward, response = SHORT_TASKS[kind](rng)
        yield [dict(id=f"{split}-short-{i}", question=question, answer=answer, source="generated", language="en", kind=kind,
                    reward=reward, response=response)]


SPLITS = ["base", "sft", "rl", "test", "words"]  # every split draws documents of its own


def mixture(short, long, long_share, size):
    """Interleave two streams of lists of examples so that the long ones hold `long_share` of the tokens, as closely as
    whole lists allow at every point. Ends when the stream that is wanted next has run out."""
    tokens, streams = {True: 0, False: 0}, {True: iter(long), False: iter(short)}
    while True:
        take_long = tokens[True] <= long_share * sum(tokens.values()) if 0 < long_share < 1 else long_share == 1
        examples = next(streams[take_long], None)
        if examples is None:
            return
        tokens[take_long] += size(examples)
        yield examples


# ---------------------------------------------------------------------------------------------------------------------- data

def task_words():
    """The words of the tasks, read off a sample of them: what the tiny tokenizer keeps whole."""
    def about(text):
        return len(text) // 4
    sample = [*short_examples(0, "words", 500), *long_examples(0, "words", 200, 200, 6, MAX_HOPS, about)]
    texts = [text for examples in sample for e in examples for text in (prompt_messages(e)[0]["content"], e["response"])]
    texts += ["user\n", "assistant\n"]
    return sorted({piece for text in texts for piece in regex.findall(QWEN_PATTERN, text) if len(piece) > 1})


MAX_HOPS = 8          # links of the longest question
BASE_LENS = 64, 96    # prompt tokens of the documents in the base model's training: the short world it comes from


def write_data(cfg, tokenizer):
    """The JSONL files of every stage. Returns their paths by name."""
    counts = {}

    def count(text):  # documents are sentences joined by spaces, and tokens never reach across: lengths add up
        if text not in counts:
            counts[text] = len(tokenizer.encode(text))
        return counts[text]

    def size(examples):  # tokens of a document count once, as they are computed once
        document = len(tokenizer.encode(examples[0].get("document", "")))
        return document + sum(len(tokenizer.chat(prompt_messages(e))) - document + len(tokenizer.completion(e["response"]))
                              for e in examples)

    # what a prompt holds besides its document: template and question, at their longest
    frame = max(len(tokenizer.chat(prompt_messages(e | dict(document=HEADER))))
                for examples in long_examples(0, "words", 50, 200, 6, MAX_HOPS, count) for e in examples)

    def documents(split, n, length, questions):
        return long_examples(cfg.seed, split, n, length - frame, questions, MAX_HOPS, count)

    def mixed(split, n, lengths, questions, long_share):
        """Short examples and n documents of the lengths in turn, by shares of tokens."""
        rounds = zip(*(documents(split, n // len(lengths), length, questions) for length in lengths))
        return mixture(short_examples(cfg.seed, split, 10**6), (d for r in rounds for d in r), long_share, size)

    def test():
        yield from short_examples(cfg.seed, "test", cfg.test_n * len(SHORT_TASKS))
        for length in (cfg.train_len // 2, cfg.train_len, cfg.test_len):
            yield from documents("test", cfg.test_n, length, len(LONG_TASKS))

    lengths = cfg.train_len // 2, cfg.train_len
    splits = dict(sft=mixed("sft", 1500, lengths, 8, cfg.long_share), rl=mixed("rl", 1000, lengths, 1, cfg.long_share),
                  test=test())
    if not cfg.student:
        splits["base"] = mixed("base", 5000, BASE_LENS, 8, 0.7)
    paths = {name: os.path.join(cfg.out, "data", f"{name}.jsonl") for name in splits}
    for name, lists in splits.items() if rank() == 0 else []:
        os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
        with open(paths[name] + ".writing", "w", encoding="utf-8") as f:
            for examples in tqdm(lists, desc=f"{'data':8} {paths[name]}", unit=" documents"):
                f.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        os.replace(paths[name] + ".writing", paths[name])
    barrier()
    return paths


# --------------------------------------------------------------------------------------------------------------------- table

def summary(rows):
    """Long and short score: means over their cells (task and length), with the standard error that follows from theirs."""
    scores = {}
    for name, tasks in dict(long=LONG_TASKS, short=SHORT_TASKS).items():
        cells = [r for r in rows if r["family"] in tasks]
        scores[name] = float(np.mean([r["mean"] for r in cells]))
        scores[name + "_stderr"] = math.sqrt(sum(r["stderr"] ** 2 for r in cells)) / len(cells)
    return scores


def table(results):
    """results.jsonl's rows as a Markdown table; scores in percent with standard errors."""
    cells = [(r["family"], r["length"]) for r in results[0]["scores"]]
    lines = ["| arm | long | short | " + " | ".join(f"{family} {length}" for family, length in cells) + " |",
             "|---" * (len(cells) + 3) + "|"]
    for r in results:
        scores = [f"{100 * r[name]:.1f} ± {100 * r[name + '_stderr']:.1f}" for name in ("long", "short")]
        scores += [f"{100 * c['mean']:.0f} ± {100 * c['stderr']:.0f}" for c in r["scores"]]
        lines.append(f"| {r['arm']} | " + " | ".join(scores) + " |")
    return "\n".join(lines)


PANELS = ["reward", "loss", "kl", "entropy", "length", "truncated", "zero_variance", "clipped", "logp_diff", "grad_norm", "lr",
          "memory_gb"]


def plot(out):
    """Draw the metrics.jsonl files below `out` into out/metrics.png: a panel for each quantity, a line for each run."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    runs = {os.path.relpath(folder, out): read_rows(os.path.join(folder, "metrics.jsonl"))[1:]
            for folder, _, files in sorted(os.walk(out)) if "metrics.jsonl" in files}
    runs = {name: rows for name, rows in runs.items() if rows and "step" in rows[0]}
    if not runs:
        raise UserError(f"--plot {out}: no metrics.jsonl with steps below it")
    panels = [name for name in PANELS if any(name in rows[0] for rows in runs.values())]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(13, 3 * -(-len(panels) // 3)), squeeze=False)
    styles = [dict(color=c, linestyle=s) for s in ("-", "--", ":") for c in ("0", "0.45", "tab:blue", "tab:orange")]
    for axis, panel in zip(axes.flat, panels):
        for (name, rows), style in zip(runs.items(), styles * len(runs)):
            rows = [row for row in rows if panel in row]
            axis.plot([row["step"] for row in rows], [row[panel] for row in rows], label=name, linewidth=1, **style)
        axis.set(title=panel, xlabel="step")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", ncols=3)
    figure.tight_layout()
    path = os.path.join(out, "metrics.png")
    figure.savefig(path, dpi=110)
    print(f"drew {len(runs)} runs into {path}")


# ---------------------------------------------------------------------------------------------------------------------- main

def deepen(path, out, seed):
    """Make the tiny teacher out of the base model: one more layer, which at first adds nothing to the residual stream. It
    knows at once what the base knows, which spares its own, longer, training on short texts."""
    base, tokenizer = load(path)
    teacher = new_model(ModelConfig(vocab_size=base.config.vocab_size, **PRESETS["tiny-teacher"]), seed)
    teacher.load_state_dict(base.state_dict(), strict=False)
    for layer in teacher.layers[len(base.layers):]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    save(out, teacher, tokenizer)


def main(cfg):
    if cfg.plot:
        return plot(cfg.plot)
    if cfg.until not in ("", "data", "base", "teacher", "sft"):
        raise UserError(f"--until {cfg.until}: choose one of data, base, teacher, sft, or leave it out for the whole recipe")
    if cfg.train_len < 2 * BASE_LENS[0] or cfg.test_len <= cfg.train_len:
        raise UserError(f"--train-len {cfg.train_len} must be at least {2 * BASE_LENS[0]}, --test-len {cfg.test_len} longer")
    if (cfg.train_len - 1).bit_length() == (cfg.test_len - 1).bit_length():  # evaluate() sorts lengths by powers of two
        raise UserError(f"--train-len {cfg.train_len} and --test-len {cfg.test_len} would share a column of the table: "
                        "put a power of two between them")
    if bool(cfg.student) != bool(cfg.teacher):
        raise UserError("give both --student and --teacher, or neither: the tiny ones share a tokenizer of their own")
    # mistakes show now, not after the cold start
    rl = dict(batch=cfg.batch, group=cfg.group, max_new=cfg.max_new, micro=cfg.micro)
    grpo.check(grpo.Config(**rl, beta=cfg.beta))
    opd.check(opd.Config(**rl))
    check_flags(cfg, ["test_n"])
    if cfg.train_len + cfg.group * cfg.max_new > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: a prompt with its {cfg.group} completions can take "
                        f"{cfg.train_len + cfg.group * cfg.max_new} tokens")
    if not 0 <= cfg.long_share <= 1:
        raise UserError(f"--long-share {cfg.long_share}: a share lies between 0 and 1")
    if cfg.student:
        tokenizer = Tokenizer.from_dir(cfg.student)
        if not tokenizer.same_encoding(Tokenizer.from_dir(cfg.teacher)):
            raise UserError(f"the teacher {cfg.teacher} encodes text otherwise than the student {cfg.student}: choose "
                            "one of the same family")
    device, began = init(), time.time()
    log = Log(cfg, "recipe")
    log.begin(keep=lambda row: cfg.resume)  # of a run that stopped, the arms that are done

    def at(name):
        return os.path.join(cfg.out, name)

    if not cfg.student:
        tokenizer = tiny_tokenizer(task_words())
        rows = -(-tokenizer.n_vocab // 64) * 64
        save(at("init"), new_model(ModelConfig(vocab_size=rows, **PRESETS["tiny-student"]), cfg.seed), tokenizer)
    data = write_data(cfg, tokenizer)
    ctx = cfg.test_len + cfg.max_new
    common = dict(ctx=ctx, seed=cfg.seed, micro=cfg.micro, save_every=cfg.save_every, resume=cfg.resume)

    def fine_tune(name, model, data, steps, lr, **options):
        sft.main(sft.Config(model=model, data=data, out=at(name), steps=steps, lr=lr, **common, **options))
        return at(name)

    def reinforce(stage, name, model, **options):
        stage.main(stage.Config(model=model, data=data["rl"], out=at(name), steps=cfg.rl_steps, lr=cfg.rl_lr,
                                batch=cfg.batch, group=cfg.group, max_new=cfg.max_new, **common, **options))
        return at(name)

    # the models that the paper takes as given: a base that is good at short texts, and a better, larger teacher
    base, teacher = cfg.student, cfg.teacher
    stages = ["data", "base", "teacher", "sft"]
    last = stages.index(cfg.until) if cfg.until else len(stages)
    if last >= 1 and not cfg.student:
        base = fine_tune("base", at("init"), data["base"], cfg.base_steps, 3e-3, schedule="cosine", warmup=20,
                         batch=32)
    if last >= 2 and not cfg.teacher:
        deepen(base, at("init-teacher"), cfg.seed)
        teacher = fine_tune("teacher", at("init-teacher"), data["sft"], cfg.teacher_steps, 1e-3)

    # the recipe, and what it is compared with; every arm has the same rollouts and steps
    if last >= 3:
        start = fine_tune("sft", base, data["sft"], cfg.sft_steps, cfg.sft_lr)
    if last < len(stages):
        if rank() == 0:
            print(f"stopped after {cfg.until}, as --until says")
        return
    dgrpo = dict(teacher=teacher, beta=cfg.beta)
    arms = {"teacher": lambda: teacher, "base": lambda: base, "+SFT": lambda: start,
            "SFT+GRPO": lambda: reinforce(grpo, "sft-grpo", start),
            "SFT+OPD": lambda: reinforce(opd, "sft-opd", start, teacher=teacher),
            "SFT+dGRPO": lambda: reinforce(grpo, "sft-dgrpo", start, **dgrpo),
            "dGRPO without SFT": lambda: reinforce(grpo, "dgrpo", base, **dgrpo)}
    test, done = read_examples(data["test"]), gather(read_rows(log.path)[1:] if rank() == 0 else None)[0]
    results = {row["arm"]: row for row in done}
    for arm in [arm for arm in arms if arm not in results]:
        began_arm = time.time()
        path = arms[arm]()
        seconds = time.time() - began_arm
        model, tokenizer = load(path, device=device)
        rows = evaluate(model, tokenizer, test, ctx, cfg.max_new, seed=cfg.seed, progress=f"{'test':8} {arm}")
        results[arm] = dict(arm=arm, seed=cfg.seed, **summary(rows), n=len(test), steps=cfg.rl_steps, seconds=seconds,
                            scores=rows)
        log(results[arm])
    log.close()
    if rank() > 0:
        return
    results = [results[arm] for arm in arms]
    write_file(at("results.jsonl"), "".join(json.dumps(r) + "\n" for r in results).encode())
    write_file(at("results.md"), f"{table(results)}\n".encode())
    print(f"\nMean score in %, ± standard error; {cfg.test_n} test examples per task and length, {cfg.test_len} tokens is a "
          f"length no stage has seen.\n\n{table(results)}\n\nThis took {(time.time() - began) / 60:.1f} minutes; see {cfg.out}/.")


if __name__ == "__main__":
    run(main, Config)
