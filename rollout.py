"""
Rollouts: reading examples, sampling completions, scoring them.

The sampler is built for many completions of one long prompt. The prompt is computed once, in chunks, and its keys and
values are stored once; every decoding step reads them once for all completions, as one matrix product with
G x heads rows instead of G x heads separate vectors:

    scores = [ q K_prompt^T | q K_own^T ]      one softmax over both parts
    out    =   p_prompt V_prompt + p_own V_own

    python rollout.py --model out/sft --prompt "Who follows Ada?"          print completions as they finish
    python rollout.py --model DIR --context-file book.txt --prompt "..."   a long document in front of the prompt
"""
import json, math, sys, time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import UserError, causal_attention, init, load, run

# ----------------------------------------------------------------------------------------------------------------- examples

def read_examples(path, response_field=None):
    """Examples of a JSONL file, one per line: document, question, answer (a text or a list of texts) and whatever else
    the line holds; `messages` may stand in for document and question.

    response_field: the column that must hold a demonstration. Every fault is a UserError with file and line number."""
    examples = []
    try:
        file = open(path, "rb")  # json decodes, so that a line that is not UTF-8 is named like any other
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}; `python recipe.py --until data` makes "
                        "the laptop's files") from None
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            if not isinstance(example, dict):
                raise UserError(f"{where}: expected an object with question and answer, found {type(example).__name__}")
            if "messages" not in example and not (isinstance(example.get("question"), str) and example["question"].strip()):
                raise UserError(f"{where}: no question (a text), and no messages")
            if not is_conversation(example.get("messages", [dict(role="user", content="")])):
                raise UserError(f"{where}: messages must be a list of role and content that begins with a user or system "
                                "turn")
            if not isinstance(example.get("document", ""), str):
                raise UserError(f"{where}: document must be a text, found {type(example['document']).__name__}")
            if response_field is None:
                answers = example.get("answer")
                answers = answers if isinstance(answers, list) else [answers]
                if not answers or not all(isinstance(a, str) and normalise(a) for a in answers):
                    raise UserError(f"{where}: answer must be a text or a list of texts, found "
                                    f"{example.get('answer')!r:.80}")
                if example.get("reward", "exact") not in REWARDS:
                    raise UserError(f"{where}: unknown reward {example['reward']!r}; there are: {', '.join(REWARDS)}")
            elif not isinstance(demonstration(example, response_field), str):
                raise UserError(f"{where}: no {response_field} (a text), the demonstration to learn from")
            examples.append(example)
    if not examples:
        raise UserError(f"{path} holds no example")
    return examples


def is_conversation(messages):
    return (isinstance(messages, list) and bool(messages)
            and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
            and all(m.get("role") in ("system", "user", "assistant") for m in messages)
            and messages[0]["role"] != "assistant")


def prompt_messages(example):
    """The conversation up to the turn that is to be written: document first, then the question, so that questions on
    one document share their beginning."""
    if "messages" in example:
        messages = example["messages"]
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    document = example.get("document", "")
    return [dict(role="user", content=f"{document}\n\n{example['question']}" if document else example["question"])]


def demonstration(example, field):
    if "messages" in example and field not in example:
        return example["messages"][-1]["content"] if example["messages"][-1]["role"] == "assistant" else None
    return example.get(field)


def prompt_ids(tokenizer, example, ctx, room):
    """Ids of an example's prompt; UserError if prompt + room for the completion do not fit into ctx tokens."""
    ids = tokenizer.chat(prompt_messages(example))
    if len(ids) + room > ctx:
        raise UserError(f"example {example.get('id')!r} needs {len(ids)} prompt tokens + {room} for the completion, "
                        f"--ctx is {ctx}: raise --ctx or leave the example out")
    return ids


def data_order(n, batch, step, seed):
    """Which of n examples a step takes: every epoch is a permutation of its own, and only (seed, step) decide."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {e: np.random.default_rng([seed, e]).permutation(n) for e in {p // n for p in places}}
    return [int(epochs[p // n][p % n]) for p in places]


# ------------------------------------------------------------------------------------------------------------------ sampler

@dataclass
class Completion:
    tokens: list       # the last one is a stop id if finished
    logps: list        # log-prob of each under softmax(logits / temperature), what the trainer computes
    finished: bool     # False: cut off at max_new_tokens


class Cache:
    """Keys and values of U prompts, each stored once, and of a grid of U x G completions that are all equally long.

    Per layer: prompt_k, prompt_v [U, K, P_max, C] and own_k, own_v [U, G, K, room, C]. Before a forward pass
    `segments` says which pieces of prompts are in the stream, or is None for a decoding step of the whole grid."""

    BLOCK = 64  # the completions' part grows by so many tokens at a time

    def __init__(self, config, lengths, dtype, device):
        """lengths: tokens of each of the U prompts."""
        self.lengths = torch.tensor(lengths, device=device)
        layers = range(config.num_hidden_layers)
        shape = len(lengths), config.num_key_value_heads, max(lengths), config.head_dim
        self.prompt_k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # zeros: 0 * NaN would be NaN
        self.prompt_v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.own_k, self.own_v = [], []
        self.segments, self.step = None, 0
        self._mask()

    def _mask(self):
        """Added to the prompt scores [U, 1, 1, 1, P_max]: -inf beyond the end of a prompt shorter than the longest."""
        beyond = torch.arange(self.prompt_k[0].shape[2], device=self.lengths.device) >= self.lengths[:, None]
        self.mask = torch.zeros(beyond.shape, device=beyond.device).masked_fill(beyond, -math.inf)[:, None, None, None]

    def start(self, G):
        """The prompts are in: make room for G completions of each."""
        U, K, _, C = self.prompt_k[0].shape
        empty = self.prompt_k[0].new_zeros(U, G, K, 0, C)
        self.own_k, self.own_v, self.segments = [empty for _ in self.prompt_k], [empty for _ in self.prompt_k], None

    def grow(self):
        """Called before each step: one more block of room when the last is full."""
        U, G, K, room, C = self.own_k[0].shape
        if self.step == room:
            block = self.own_k[0].new_zeros(U, G, K, self.BLOCK, C)
            self.own_k = [torch.cat([k, block], 3) for k in self.own_k]
            self.own_v = [torch.cat([v, block], 3) for v in self.own_v]

    def keep(self, prompts, grid):
        """Drop all but the given prompts [U'] and, for each of these, the given completions [U', G']."""
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            self.prompt_k, self.prompt_v = [k[prompts] for k in self.prompt_k], [v[prompts] for v in self.prompt_v]
            self._mask()
        self.own_k = [k[prompts[:, None], grid] for k in self.own_k]
        self.own_v = [v[prompts[:, None], grid] for v in self.own_v]

    def attend(self, layer, q, k, v):
        """q [T, H, C], k and v [T, K, C] -> [T, H, C]; k and v are stored on the way."""
        return (self._attend_prompts if self.segments else self._attend_step)(layer, q, k, v)

    def _attend_prompts(self, layer, q, k, v):
        """Each segment (prompt, start, end) sees the chunks of its prompt stored before, and itself causally."""
        out, at = [], 0
        for u, start, end in self.segments:
            here = slice(at, at + end - start)
            all_k, all_v = self.prompt_k[layer][u].transpose(0, 1), self.prompt_v[layer][u].transpose(0, 1)   # [P, K, C]
            all_k[start:end], all_v[start:end] = k[here], v[here]
            out.append(causal_attention(q[None, here], all_k[None, :end], all_v[None, :end])[0])
            at += end - start
        return torch.cat(out)

    def _attend_step(self, layer, q, k, v):
        """One new token for each of the U x G completions."""
        (U, K, P, C), G = self.prompt_k[layer].shape, self.own_k[layer].shape[1]
        t, q = self.step, q.view(U, G, K, -1, C) / math.sqrt(C)                                       # [U, G, K, H/K, C]
        self.own_k[layer][:, :, :, t], self.own_v[layer][:, :, :, t] = k.view(U, G, K, C), v.view(U, G, K, C)
        own_k, own_v = self.own_k[layer][:, :, :, :t + 1], self.own_v[layer][:, :, :, :t + 1]         # [U, G, K, t+1, C]
        # all completions of a prompt are rows of one product with its keys, which are read once
        rows = q.transpose(1, 2).reshape(U, K, -1, C)                                                 # [U, K, G*H/K, C]
        prompt_scores = (rows @ self.prompt_k[layer].transpose(2, 3)).view(U, K, G, -1, P).transpose(1, 2)
        scores = torch.cat([prompt_scores.float() + self.mask, (q @ own_k.transpose(3, 4)).float()], -1)
        p = scores.softmax(-1).to(v.dtype)                                                            # [U, G, K, H/K, P+t+1]
        out = p[..., :P].transpose(1, 2).reshape(U, K, -1, P) @ self.prompt_v[layer]                  # [U, K, G*H/K, C]
        out = out.view(U, K, G, -1, C).transpose(1, 2) + p[..., P:] @ own_v
        return out.reshape(U * G, -1, C)


def prefill(model, cache, prompts, chunk):
    """Fill the cache with the prompts, `chunk` tokens at a time whatever their number and length; -> hidden state of
    each prompt's last token [U, D]."""
    streams, room = [], 0
    for u, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            if room == 0:
                streams.append([])
                room = chunk
            end = min(len(prompt), start + room)
            streams[-1].append((u, start, end))
            room -= end - start
            start = end
    last = [None] * len(prompts)
    for cache.segments in streams:
        tokens = [t for u, start, end in cache.segments for t in prompts[u][start:end]]
        positions = [p for _, start, end in cache.segments for p in range(start, end)]
        hidden = model(stream(tokens, positions, model.device), cache)
        ends = np.cumsum([end - start for _, start, end in cache.segments]) - 1
        for (u, _, end), row in zip(cache.segments, ends):
            if end == len(prompts[u]):
                last[u] = hidden[row]
    return torch.stack(last)


def stream(tokens, positions, device):
    return SimpleNamespace(tokens=torch.as_tensor(tokens, device=device),
                           positions=torch.as_tensor(positions, device=device))


def pick(logits, noise, temperature, top_p=1.0, top_k=0, min_p=0.0):
    """One token per row of logits [S, V], by the inverse of the distribution function at noise [S] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    z = logits / temperature
    if min_p > 0:  # tokens less than min_p times as likely as the likeliest are out
        z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:  # the smallest set of likeliest tokens that holds top_p of the mass
        ordered, index = z.sort(-1, descending=True)
        p = ordered.softmax(-1)
        z = z.scatter(-1, index, ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf))
    mass = z.softmax(-1).double().cumsum(-1)  # double: the tail of 150K summands must not be rounded away
    return torch.searchsorted(mass, noise.double()[:, None] * mass[:, -1:], right=True)[:, 0]


@torch.no_grad()
def generate(model, prompts, n=1, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0,
             stop_ids=(), seed=0, chunk=2048, kv_tokens=2**18, on_done=None, numbers=None):
    """Sample n completions of each prompt -> [[Completion, ...n], ...], in the order of the prompts.

    prompts are lists of token ids. temperature 0 is greedy. presence_penalty is subtracted from the logits of tokens that
    the completion already holds. seed is a number or several. The noise of a completion depends on (seed, index of its
    prompt, its own index) alone, so neighbours, order and waves do not change it. chunk bounds the tokens of one prefill
    pass; prompts are served in waves of similar length of at most kv_tokens stored positions (one prompt at least).
    on_done(prompt, i, Completion) is called as completions finish. Raises UserError for an empty prompt or n < 1."""
    if n < 1 or max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise UserError("sampling needs n >= 1, max_new_tokens >= 0, temperature >= 0, top_k >= 0, 0 < top_p <= 1 and "
                        f"0 <= min_p <= 1, found n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, "
                        f"top_k={top_k}, top_p={top_p}, min_p={min_p}")
    if not all(len(prompt) for prompt in prompts):
        raise UserError(f"prompt {[len(p) for p in prompts].index(0)} is empty: it needs at least one token")
    if max_new_tokens == 0:
        return [[Completion([], [], False) for _ in range(n)] for _ in prompts]
    done, seed = {}, seed if isinstance(seed, (tuple, list)) else (seed,)

    def finish(which, tokens, logps, finished):
        done[which] = Completion(tokens, logps, finished)
        if on_done:
            on_done(which // n, which % n, done[which])

    waves = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):  # longest first: waves of similar length
        longest = len(prompts[waves[-1][0]]) if waves else 0
        if not waves or (len(waves[-1]) + 1) * (longest + n * max_new_tokens) > kv_tokens:
            waves.append([])
        waves[-1].append(i)
    sampling = dict(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    for wave in waves:
        noise = np.stack([np.random.default_rng([*seed, numbers[i] if numbers else i, j]).random(max_new_tokens, dtype=np.float32)
                          for i in wave for j in range(n)])
        sample_wave(model, [prompts[i] for i in wave], n, max_new_tokens, noise, sampling, presence_penalty, stop_ids, chunk,
                    lambda which, *rest: finish(wave[which // n] * n + which % n, *rest))
    return [[done[i * n + j] for j in range(n)] for i in range(len(prompts))]


def sample_wave(model, prompts, n, max_new_tokens, noise, sampling, presence_penalty, stop_ids, chunk, finish):
    """Prefill and decode one wave; finish(index, tokens, logps, finished) is called once for each of its completions."""
    device, temperature = model.device, sampling["temperature"]
    head, V = model.head_weight, model.n_vocab
    cache = Cache(model.config, [len(p) for p in prompts], head.dtype, device)

    def logits_of(hidden):  # [.., D] -> [.., V] in fp32; rows of the head beyond the tokenizer's ids are never sampled
        return F.linear(hidden, head[:V]).float()

    logits = logits_of(prefill(model, cache, prompts, chunk)).repeat_interleave(n, 0)          # [U*n, V]
    cache.start(n)
    noise, stops = torch.from_numpy(noise).to(device), torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=device)                         # [all completions, R]
    logps = torch.zeros(noise.shape, device=device)
    seen = torch.zeros(len(noise), V, dtype=torch.bool, device=device) if presence_penalty else None
    live_host = np.arange(len(noise)).reshape(len(prompts), n)                                 # grid slot -> completion
    live, ended = torch.from_numpy(live_host).to(device), np.zeros(len(noise), dtype=bool)

    for t in range(max_new_tokens):
        slots = live.flatten()
        shown = logits - presence_penalty * seen[slots] if presence_penalty else logits
        token = pick(shown, noise[slots, t], **sampling)                                       # [slots]
        # the log-prob is the trainer's: tempered, but neither penalised nor cut off
        scaled = logits / temperature if temperature else logits
        logp = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)
        tokens[slots, t], logps[slots, t] = token, logp
        if presence_penalty:
            seen[slots, token] = True

        stopped = torch.isin(token, stops).cpu().numpy()                                       # the step's only transfer
        for which, stop in zip(live_host.flatten(), stopped):
            if (stop or t == max_new_tokens - 1) and not ended[which]:
                ended[which] = True
                finish(which, tokens[which, :t + 1].tolist(), logps[which, :t + 1].tolist(), bool(stop))
        alive = ~ended[live_host]                                                              # [U, G]
        if not alive.any():
            return
        # Finished completions leave once a quarter of the grid is idle: then copying the rest pays. The grid stays
        # rectangular; a prompt with fewer live completions than the busiest one keeps some finished ones, unread.
        U, G = int(alive.any(1).sum()), int(alive.sum(1).max())
        if U * G <= 0.75 * alive.size:
            rows = np.flatnonzero(alive.any(1))                                                # [U']
            grid = np.argsort(~alive[rows], axis=1, kind="stable")[:, :G]                      # [U', G'], live ones first
            live_host = live_host[rows[:, None], grid]
            rows, grid = torch.from_numpy(rows).to(device), torch.from_numpy(grid.copy()).to(device)
            cache.keep(rows, grid)
            token, live = token.view(live.shape)[rows[:, None], grid].flatten(), live[rows[:, None], grid]
        cache.grow()
        positions = (cache.lengths[:, None] + t).expand(live.shape).flatten()
        logits = logits_of(model(stream(token, positions, device), cache))
        cache.step += 1


# ------------------------------------------------------------------------------------------------------------------ rewards

def final_answer(text):
    """What stands after the thoughts and the last "Answer:", one line; empty when the thoughts never end."""
    if "<think>" in text and "</think>" not in text:
        return ""
    text = text.split("</think>")[-1]
    return text.rpartition("Answer:")[2].strip().split("\n")[0].strip() if "Answer:" in text else ""


def normalise(text):
    """Lower case, no punctuation at either end, single spaces: "  Rome. " and "rome" are the same answer."""
    return " ".join(text.lower().strip(" \t\n.,;:!?\"'`*").split())


def exact(answer, accepted):
    """1 if the answer is one of the accepted ones. exact("Rome.", ["rome", "Roma"]) = 1"""
    return float(normalise(answer) in [normalise(a) for a in accepted] and normalise(answer) != "")


def sequence(answer, items):
    """F1 of the longest common subsequence with the items, split at commas: order counts, extra items cost.

    sequence("Bob, Eve, Dan", ["Bob", "Dan"]) = 2 * 2 / (3 + 2) = 0.8"""
    found, wanted = [normalise(a) for a in answer.split(",") if normalise(a)], [normalise(a) for a in items]
    best = [0] * (len(wanted) + 1)  # best[j]: longest common subsequence of what was read of `found` with wanted[:j]
    for item in found:
        diagonal = 0
        for j, want in enumerate(wanted):
            diagonal, best[j + 1] = best[j + 1], diagonal + 1 if item == want else max(best[j + 1], best[j])
    return 2 * best[-1] / (len(found) + len(wanted)) if found else 0.0


REWARDS = {"exact": exact, "sequence": sequence}  # name in the example -> function(final answer, list of reference texts)


def score(example, text):
    """Reward of a completion's text in [0, 1], by the rule that the example names."""
    answer = example["answer"]
    return REWARDS[example.get("reward", "exact")](final_answer(text), answer if isinstance(answer, list) else [answer])


def completion_text(tokenizer, completion):
    """Text without the stop token."""
    return tokenizer.decode(completion.tokens[:-1] if completion.finished else completion.tokens)


# --------------------------------------------------------------------------------------------------------------- evaluation

def evaluate(model, tokenizer, examples, ctx, max_new_tokens, seed=0, progress=None, **sampling):
    """Score one completion of each example -> rows dict(family, length, n, mean, stderr, truncated, tokens).

    family is the example's `kind`; length the smallest power of two that holds its prompt; truncated the share of
    completions cut off at max_new_tokens; tokens the mean length of completions."""
    prompts = [prompt_ids(tokenizer, e, ctx, max_new_tokens) for e in examples]
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False)
    completions = generate(model, prompts, 1, max_new_tokens, stop_ids=tokenizer.stop_ids, seed=seed,
                           on_done=lambda *_: bar.update(), **sampling)
    bar.close()
    cells = {}
    for example, prompt, (completion,) in zip(examples, prompts, completions):
        cell = example.get("kind", "all"), 2 ** math.ceil(math.log2(len(prompt)))
        cells.setdefault(cell, []).append((score(example, completion_text(tokenizer, completion)), completion))
    rows = []
    for (family, length), scored in sorted(cells.items()):
        rows.append(dict(family=family, length=length, **mean_and_error([s for s, _ in scored]),
                         truncated=sum(not c.finished for _, c in scored) / len(scored),
                         tokens=sum(len(c.tokens) for _, c in scored) / len(scored)))
    return rows


def mean_and_error(values):
    """n, mean and the standard error of the mean (0 for a single value)."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return dict(n=len(values), mean=float(values.mean()), stderr=float(error))


# ------------------------------------------------------------------------------------------------------------- command line

@dataclass
class Config:
    """Print completions of a prompt as they finish."""
    model: str = "out/sft"           # checkpoint directory
    prompt: str = ""                 # the user's turn, or with --no-chat the text to go on from
    prompt_file: str = ""            # the same, read from a file
    context_file: str = ""           # a document to put in front of the prompt
    chat: bool = True                # put the prompt into the checkpoint's chat template
    think: bool = True               # let the model think first, where its template offers the choice
    n: int = 1                       # completions of the prompt
    max_new: int = 256               # tokens of a completion at most
    temperature: float = 0.6         # 0 is greedy
    top_p: float = 0.95              # keep the likeliest tokens that hold this much of the mass
    top_k: int = 20                  # keep so many of the likeliest tokens, 0 for all
    min_p: float = 0.0               # drop tokens less likely than this share of the likeliest one
    presence_penalty: float = 0.0    # subtracted from the logits of tokens already written
    seed: int = 0                    # the same seed gives the same completions


def read_text(path):
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def main(cfg):
    text = read_text(cfg.prompt_file) if cfg.prompt_file else cfg.prompt
    if not text:
        raise UserError("nothing to complete: give --prompt or --prompt-file")
    if cfg.context_file:
        text = read_text(cfg.context_file) + "\n\n" + text
    device = init()
    model, tokenizer = load(cfg.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    chat = [dict(role="user", content=text)]
    ids = tokenizer.chat(chat, cfg.think) if cfg.chat else tokenizer.bos + tokenizer.encode(text)

    def show(_, i, completion):
        end = "" if completion.finished else f"\n[cut off at {cfg.max_new} tokens, see --max-new]"
        print(f"--- completion {i + 1} of {cfg.n}\n{completion_text(tokenizer, completion)}{end}", flush=True)

    began = time.time()
    completions = generate(model, [ids], cfg.n, cfg.max_new, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p,
                           cfg.presence_penalty, tokenizer.stop_ids, cfg.seed, on_done=show)[0]
    seconds, count = time.time() - began, sum(len(c.tokens) for c in completions)
    print(f"--- {len(ids)} prompt tokens, {count} new tokens in {seconds:.1f} s: {count / seconds:.1f} new tokens/s",
          file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
