"""
The model: tokenizer, packed streams, transformer, checkpoints, and the few functions every script shares.

One decoder serves the whole recipe, from a 0.4M-parameter student on a laptop to Qwen3-32B as a teacher. It
reads and writes Hugging Face directories (Qwen3, Qwen2/2.5, Llama-3.x architectures), so what a stage leaves
behind loads in transformers, vLLM and lm-eval unchanged.

The one unusual thing is the shape of its input. There is no padding and no batch axis:
tokens come as one flat stream
    prompt 1, completion 1.1, ..., completion 1.G, prompt 2, ...
in which every completion sees its prompt and itself, and nothing else (class Pack). A prompt of 128K tokens
with 8 completions is computed once, not 8 times. Everything but attention works row by row on [T, D] and
never notices.

Letters used in all files:
    T tokens in a stream      P prompt tokens    G completions of one prompt      R completion tokens
    N rows that carry loss    D hidden size      H / K query / key-value heads    C head size    V vocabulary
"""
import argparse, dataclasses, datetime, fcntl, functools, inspect, itertools, json, math, os, re, shutil
import signal, sys, time, unicodedata
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from kernels import CHUNK_BYTES, high_water


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend; the message says how.
    Scripts print it without a traceback."""


def parse_json(text, where):
    """The JSON object in a text or bytes."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a JSON object")
    return content


def read_bytes(path):
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a named pipe would be waited for
            raise UserError(f"{path} is not a file")
        with open(path, "rb") as f:
            return f.read()
    except OSError as error:
        raise UserError(f"{path} does not exist" if not os.path.exists(path)
                        else f"{path}: {error}") from None


def read_json(path):
    return parse_json(read_bytes(path), path)


@contextmanager
def laid_out_as(what, where):
    """Guard of lines that only take fields out of foreign JSON:
    one that is not there, or is something else, is named."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not laid out as {what}: {type(error).__name__} "
                        f"{str(error)!r:.200}") from None


# -------------------------------------------------------------------------------------------------- tokenizer

# Qwen's pre-tokens: contractions, words with one leading character, single digits, punctuation, white space
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
PATTERNS = (QWEN_PATTERN, QWEN_PATTERN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), GPT2_PATTERN)  # 2nd: Llama 3
CHATML = {"<|im_start|>", "<|im_end|>"}  # the special tokens that a chat template writes
LLAMA3 = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def byte_alphabet():
    """Byte -> the printable character that stands for it in tokenizer.json (GPT-2's table): printable bytes
    stand for themselves, the other 68 are moved to U+0100 onwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(moved)}


def joined_last(a, b, last, rank):
    """Whether byte pair encoding makes a + b of a and b: nothing is joined across their border before.

    Goes back in time: of the two tokens at the border, the one made later is taken apart."""
    before = rank[a + b]
    while rank.get(a + b, before) >= before:
        if len(a) == len(b) == 1:
            return True
        take_left = len(b) == 1 or len(a) > 1 and rank[a] > rank[b]
        if (a if take_left else b) not in last:
            return False
        if take_left:
            before, a = rank[a], last[a][1]
        else:
            before, b = rank[b] + 1, last[b][0]  # of equal ranks the left one comes first
    return False


class Tokenizer:
    """Byte-level BPE of a Hugging Face `tokenizer.json`, run by tiktoken,
    and the chat template that goes with it.

    Text of documents, questions and users can never become a special token: those enter only where the
    template puts them, so "<|im_end|>" inside a document cannot close the turn."""

    def __init__(self, files, where="tokenizer"):
        """files: name -> bytes of the TOKENIZER_FILES that exist;
        they are kept, and saved again byte for byte."""
        self.files, self.where = files, where
        if "tokenizer.json" not in files:
            raise UserError(f"{where} has no tokenizer.json")
        spec, config, generation = (parse_json(files.get(name, "{}"), f"{where}/{name}")
                                    for name in TOKENIZER_FILES[:3])
        with laid_out_as("one of byte-level BPE", f"{where}/tokenizer.json"):
            pairs = self._read_spec(spec)
        # tiktoken wants all 256 bytes: those the vocabulary lacks get ids past its end; encode() drops them
        self.missing = bytes(b for b in range(256) if bytes([b]) not in self.ranks)
        ranks = self.ranks | {bytes([b]): self.n_vocab + i for i, b in enumerate(self.missing)}
        self.encoding = tiktoken.Encoding("checkpoint", pat_str=self.pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special)
        self._check_same_merges(pairs, spec["model"])

        with laid_out_as("one with an eos_token and a chat_template", f"{where}/tokenizer_config.json"):
            eos = config.get("eos_token")
            eos = eos["content"] if isinstance(eos, dict) else eos
            if eos is not None and eos not in self.special:
                raise UserError(f"{where}: eos_token {eos!r:.80} of tokenizer_config.json "
                                "is not an added token")
            self.template = self._known_template(config)  # None in a base model: fine until a chat is wanted
        self.turn_end = (eos if self.template is None
                         else "<|im_end|>" if "<|im_end|>" in self.template else "<|eot_id|>")
        stops = generation.get("eos_token_id")
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(type(i) is int and 0 <= i < self.n_vocab for i in stops):
            raise UserError(f"{where}/generation_config.json: eos_token_id {stops!r:.80} "
                            f"is not below {self.n_vocab}")
        self.stop_ids = sorted({self.special[name] for name in (eos, self.turn_end) if name is not None}
                               | {*stops})

    @classmethod
    def from_dir(cls, path):
        files = {}
        for name in TOKENIZER_FILES:
            if os.path.lexists(os.path.join(path, name)):
                files[name] = read_bytes(os.path.join(path, name))
        return cls(files, where=path)

    def _refuse(self, what):
        raise UserError(f"{self.where}/tokenizer.json: {what} is not supported (only byte-level BPE is)")

    def _read_spec(self, spec):
        """Take what we use out of tokenizer.json, refuse what tiktoken cannot do -> its merges."""
        bpe, pre, normalizer = (spec.get(key) or {} for key in ("model", "pre_tokenizer", "normalizer"))
        if bpe.get("type") != "BPE":
            self._refuse(f"model type {bpe.get('type')!r:.80}")
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                    "byte_fallback"):
            if bpe.get(key):
                self._refuse(f"{key} {bpe[key]!r:.80}")
        self.nfc = bool(normalizer)
        if self.nfc and normalizer["type"] != "NFC":
            self._refuse(f"normalizer {normalizer['type']!r:.80}")
        *splits, level = pre.get("pretokenizers") or [pre]
        self.pattern = splits[0].get("pattern", {}).get("Regex") if splits else GPT2_PATTERN
        if not (level.get("type") == "ByteLevel" and not level.get("add_prefix_space")
                and self.pattern in PATTERNS
                and all(s["type"] == "Split" and s["behavior"] == "Isolated" and not s.get("invert")
                        for s in splits)
                and len(splits) < 2 and level.get("use_regex", True) == (not splits)):
            self._refuse(f"pre_tokenizer {pre!r:.400}")
        post = spec.get("post_processor") or {"type": "ByteLevel"}
        steps = post["processors"] if post["type"] == "Sequence" else [post]
        if not all(step["type"] in ("ByteLevel", "TemplateProcessing") for step in steps):
            self._refuse(f"post_processor {post!r:.400}")

        added = spec.get("added_tokens") or []
        for token in added:
            # content of one byte would be lost to plain text
            if not isinstance(token["special"], bool) or len(token["content"].encode()) < 2:
                self._refuse(f"added token {token!r:.200}")
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                self._refuse(f"added token {token['content']!r:.80} with lstrip, rstrip or single_word")
        self.special = {t["content"]: t["id"] for t in added}
        self.markup = {t["content"] for t in added if not t["special"]}  # a model may write them, as <think>
        # what the file puts in front of plain text: Llama's <|begin_of_text|>
        first = [step["single"][0] for step in steps if step["type"] == "TemplateProcessing"]
        self.bos = [self.special[f["SpecialToken"]["id"]] for f in first if "Sequence" not in f]
        return self._read_vocabulary(bpe["vocab"], bpe["merges"])

    def _read_vocabulary(self, vocab, merges):
        byte_of = {c: b for b, c in byte_alphabet().items()}
        try:
            self.ranks = {bytes(byte_of[c] for c in t): i for t, i in vocab.items() if t not in self.special}
            pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
            merged = [(vocab[a], vocab[b], vocab[a + b])[2] for a, b in pairs]  # all three must be tokens
        except KeyError as missing:
            self._refuse(f"{str(missing):.80} in the vocabulary or the merges")
        ids = [*self.ranks.values(), *self.special.values()]
        if ("" in vocab or {*map(type, ids)} != {int} or sorted(ids) != [*range(len(ids))]
                or any(vocab.get(name, i) != i for name, i in self.special.items())):
            self._refuse("a vocabulary that gives two tokens one id, an id to no token or to an empty one,")
        if any(a > b for a, b in zip(merged, merged[1:])):
            self._refuse("a vocabulary whose ids do not follow the order of its merges")
        self.n_vocab = len(ids)  # the model's rows beyond are never used
        return pairs

    def _check_same_merges(self, pairs, bpe):
        """tiktoken has no list of merges: it joins any two neighbours that make a token, the lowest id first,
        and takes a piece that is a token as a whole (the file's ignore_merges).
        Refuse a file for which this gives other ids."""
        last = {}  # token -> the two that are joined last when it is made, if the file lists them
        for a, b in pairs:
            if a + b not in last and joined_last(a, b, last, bpe["vocab"]):
                last[a + b] = a, b
        made = {bpe["vocab"][token] for token in last}
        for token, i in self.ranks.items():
            # text has no byte 255, so nothing merges with it:
            # in front of it we see what the merges alone make of the token
            reached = self.encoding._encode_single_piece(token + b"\xff")[:-1] == [i]
            if reached and len(token) > 1 and i not in made:
                self._refuse(f"token {token!r} that two others make up, without a merge for it,")
            if not reached and not bpe.get("ignore_merges"):
                self._refuse(f"token {token!r} that its merges cannot reach, without ignore_merges,")

    def _known_template(self, config):
        """Text of the chat template, or None if it is not one that chat() renders:
        those are known by their markers."""
        text = self.files.get("chat_template.jinja", b"").decode() or config.get("chat_template") or ""
        if isinstance(text, list):  # several named templates
            text = {t["name"]: t["template"] for t in text}.get("default", "")
        text = text.replace("\\n", "\n").replace("bos_token", "<|begin_of_text|>")
        markers = set(re.findall(r"<\|\w+\|>", text)) - {"<|python_tag|>", "<|eom_id|>"}  # both are for tools
        return text if markers in (CHATML, LLAMA3) and markers <= self.special.keys() else None

    def encode(self, text, allowed=()):
        """Ids of a text. Special tokens written in it are plain text, except those named in `allowed`."""
        names = "|".join(regex.escape(name) for name in sorted(allowed, key=len, reverse=True))
        ids = []
        for part in regex.split(f"({names})", text) if names else [text]:
            ids += [self.special[part]] if part in allowed else self._encode_plain(part)
        return ids

    def _encode_plain(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not self.missing or set(self.missing).isdisjoint(text.encode("utf-8", "replace")):
            try:
                return self.encoding.encode(text, disallowed_special=())
            except ValueError:  # the regex engine of tiktoken gives up on a run of a million spaces
                pass
        # as in the tokenizers library: a byte without a token vanishes after pre-tokenisation, before merging
        ids, one_piece = [], self.encoding._encode_single_piece
        for match in regex.finditer(self.pattern, text):
            piece = match[0].encode("utf-8", "replace")
            kept = piece.translate(None, self.missing)
            ids += one_piece(piece) if kept == piece else one_piece(kept + b"\xff")[:-1]  # merges only
        return ids

    def decode(self, ids):
        """Text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.encoding.decode(ids, errors="replace")

    def chat(self, messages, think=True):
        """Prompt ids of [{"role", "content"}, ...] up to where the assistant begins to write.

        think=False closes the thinking block at once where the template has one
        (Qwen3's enable_thinking=False)."""
        self._need_template()
        for m in messages:
            if m.get("role") not in ("system", "user", "assistant") or not isinstance(m.get("content"), str):
                raise UserError("a message needs a role (system, user, assistant) and a text content, "
                                f"found {m!r:.200}")
        if not messages or messages[-1]["role"] != "user":
            raise UserError(f"a chat must end with a message of the user, found {messages[-1:]!r:.200}")
        turns = [(m["role"], m["content"]) for m in messages]
        return self._chatml(turns, think) if self.turn_end == "<|im_end|>" else self._llama3(turns)

    def _chatml(self, turns, think):
        default = re.search(r"<\|im_start\|>system\n([^'<]+)<\|im_end\|>", self.template)  # of Qwen2 and 2.5
        if default and turns[0][0] != "system":
            turns = [("system", default[1])] + turns
        start, end, newline = self.special["<|im_start|>"], self.special["<|im_end|>"], self.encode("\n")
        ids = []
        for role, content in turns:
            if role == "assistant" and "</think>" in content and "</think>" in self.template:
                content = content.split("</think>")[-1].lstrip("\n")  # Qwen3 hides thoughts of earlier turns
            ids += ([start] + self.encode(f"{role}\n{content}", self.markup if role == "assistant" else ())
                    + [end] + newline)
        begun = "<think>\n" if "<|im_start|>assistant\n<think>\n" in self.template else ""  # Qwen3-Thinking
        if "enable_thinking" in self.template and not think:
            begun = "<think>\n\n</think>\n\n"
        return ids + [start] + self.encode("assistant\n" + begun, self.markup)

    def _llama3(self, turns):
        turns = [(role, content.strip()) for role, content in turns]
        # Llama 3.1 and later always open with a system turn. 3.2 would write today's date:
        # prompts must not change by the day
        if "Cutting Knowledge Date" in self.template:
            system = turns.pop(0)[1] if turns[0][0] == "system" else ""
            turns.insert(0, ("system", "Cutting Knowledge Date: December 2023\n"
                                       f"Today Date: 26 Jul 2024\n\n{system}"))
        ids = [self.special["<|begin_of_text|>"]]
        for role, content in turns + [("assistant", "")]:
            ids += ([self.special["<|start_header_id|>"]] + self.encode(role)
                    + [self.special["<|end_header_id|>"]])
            ids += (self.encode("\n\n" + content, self.markup if role == "assistant" else ())
                    + [self.special["<|eot_id|>"]])
        return ids[:-1]  # the assistant's turn stays open

    def _need_template(self):
        if self.template is None:
            raise UserError(
                f"{self.where} has no chat template we know (Qwen2.5, Qwen3 and Llama 3 ones are): "
                "put a known chat_template into its tokenizer_config.json, or use rollout.py --no-chat")

    def completion(self, text):
        """Ids of what an assistant writes: the text, in which <think> and the like are tokens,
        and the end of the turn."""
        self._need_template()
        return self.encode(text, allowed=self.markup) + [self.special[self.turn_end]]

    def same_encoding(self, other):
        """Whether both give every text the same ids: vocabularies compared token by token, not by size."""
        return all(getattr(self, name) == getattr(other, name)
                   for name in ("ranks", "special", "pattern", "nfc"))


def tiny_tokenizer(words):
    """A tokenizer for training from scratch: 256 bytes, each given word as one whole token,
    ChatML special tokens.

    It is written as the JSON of a real checkpoint, so that the tiny models are ordinary ones to everybody."""
    alphabet = byte_alphabet()
    vocab = {alphabet[b]: b for b in range(256)}
    for word in words:
        vocab.setdefault("".join(alphabet[b] for b in word.encode()), len(vocab))
    # two tokens that make up a third are joined, as tiktoken does it unasked; the merges tell other libraries
    merges = [[t[:k], t[k:]] for t in vocab for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    added = [dict(id=len(vocab) + i, content=name, single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=name.startswith("<|")) for i, name in enumerate(names)]
    split = dict(type="Split", pattern=dict(Regex=QWEN_PATTERN), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    spec = dict(version="1.0", added_tokens=added, normalizer=dict(type="NFC"), decoder=level,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
                model=dict(type="BPE", ignore_merges=True, vocab=vocab, merges=merges))
    template = ("{%- for m in messages %}{%- set content = m.content %}"
                "{%- if m.role == 'assistant' and '</think>' in content %}"
                "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
                "{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
                "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
                "{%- if enable_thinking is defined and enable_thinking is false %}"
                "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
                  pad_token="<|endoftext|>", chat_template=template, clean_up_tokenization_spaces=False)
    stops = [t["id"] for t in added[:3:2]]  # <|endoftext|> and <|im_end|>
    files = {"tokenizer.json": spec, "tokenizer_config.json": config,
             "generation_config.json": dict(eos_token_id=stops)}
    return Tokenizer({name: json.dumps(content, ensure_ascii=False, indent=1).encode()
                      for name, content in files.items()})


# ----------------------------------------------------------------------------------------------------- config

ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
ROPE_NUMBERS = {"default": [], "linear": ["factor"], "yarn": ["factor", "original_max_position_embeddings"],
                "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor",
                           "high_freq_factor"]}
ROPE_OPTIONS = ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"]  # of yarn
# Sizes beyond these are mistakes: the model would take memory, or overflow,
# before its shapes are compared with the files'
LARGEST = {int: 10**9, float: 1e30, "num_hidden_layers": 10**3, "num_attention_heads": 10**5,
           "head_dim": 10**4}


def is_positive(value, kind, largest):
    return type(value) in (int, kind) and 0 < value <= largest  # type: True is no number; NaN is never <=


@dataclass
class Config:
    """Shape of a decoder. Field names and meanings are those of Hugging Face's config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "qwen3"           # qwen3 normalises q and k per head; qwen2 has biases on q, k, v
    max_position_embeddings: int = 4096
    rope_theta: float = 1e6
    rope_scaling: dict | None = None    # None, or rope_type linear | yarn | llama3 with its numbers
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_dir(cls, path):
        """Read path/config.json. Raises UserError for another architecture, a missing field
        or an unsupported option."""
        where = os.path.join(path, "config.json")
        raw = read_json(where)
        with laid_out_as("a decoder's", where):
            cls._fill_in(raw, where)
        for f in dataclasses.fields(cls):
            value, largest = raw.setdefault(f.name, f.default), LARGEST.get(f.name, LARGEST.get(f.type))
            if not (is_positive(value, f.type, largest) if largest else isinstance(value, f.type)):
                found = "missing" if value is dataclasses.MISSING else f"{value!r:.80}"
                kind = f"a positive {f.type.__name__} up to {largest:,}" if largest else f.type.__name__
                raise UserError(f"{where}: {f.name} is {found}, expected {kind}")
        config = cls(**{f.name: raw[f.name] for f in dataclasses.fields(cls)})
        if (config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2
                or config.rope_theta <= 1):
            raise UserError(f"{where}: num_attention_heads {config.num_attention_heads} must be a multiple "
                            f"of num_key_value_heads {config.num_key_value_heads}, "
                            f"head_dim {config.head_dim} even, and rope_theta {config.rope_theta} above 1")
        return config

    @staticmethod
    def _fill_in(raw, where):
        """Refuse what is not supported, and put in place what transformers assumes
        where the file is silent."""
        found = (raw.get("architectures") or [None])[0]
        if found not in ARCHITECTURES:
            raise UserError(f"{where}: architecture {found!r:.80} is not supported; "
                            f"these are: {', '.join(ARCHITECTURES)}")
        if raw.get("use_sliding_window") or {*(raw.get("layer_types") or [])} - {"full_attention"}:
            raise UserError(f"{where}: sliding-window attention is not supported (full attention is)")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {raw['hidden_act']!r:.80} is not supported (silu is)")
        heads, raw["model_type"] = raw.get("num_attention_heads") or 1, ARCHITECTURES[found]
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
        raw["head_dim"] = raw.get("head_dim") or (
            128 if found == "Qwen3ForCausalLM" else raw.get("hidden_size", 0) // heads)
        raw.setdefault("tie_word_embeddings", False)
        rope = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}  # old spelling, new spelling
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 1e4))
        if kind not in ROPE_NUMBERS:
            raise UserError(f"{where}: RoPE scaling {kind!r:.80} is not supported; "
                            f"these are: {', '.join(ROPE_NUMBERS)}")
        original = "original_max_position_embeddings"
        if original in ROPE_NUMBERS[kind]:
            rope[original] = raw.get(original) or rope.get(original) or raw.get("max_position_embeddings")
        raw["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" else None
        for name in ROPE_NUMBERS[kind] + [name for name in ROPE_OPTIONS if rope.get(name) is not None]:
            if not is_positive(rope.get(name), float, LARGEST[float]):
                raise UserError(f"{where}: RoPE scaling {kind!r} needs a number {name} above 0, found "
                                f"{rope.get(name)!r:.80}")
        if (kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]
                or type(rope.get("truncate", True)) != bool):
            raise UserError(f"{where}: RoPE scaling needs low_freq_factor < high_freq_factor, "
                            "and a truncate of true or false")

    def to_dict(self, dtype):
        """What we write as config.json."""
        architecture = {v: k for k, v in ARCHITECTURES.items()}[self.model_type]
        return dict(architectures=[architecture], torch_dtype=str(dtype).removeprefix("torch."),
                    hidden_act="silu", use_cache=True, attention_dropout=0.0, initializer_range=0.02,
                    **dataclasses.asdict(self))


# Trained from scratch by recipe.py; vocab_size is filled in from the tokenizer there.
PRESETS = {
    "tiny-student": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, head_dim=32, rope_theta=1e3),
}
PRESETS["tiny-teacher"] = PRESETS["tiny-student"] | dict(num_hidden_layers=3)


# --------------------------------------------------------------------------------------------- packed streams

def causal_attention(q, k, v):
    """Attention of the last n of m positions to all positions up to their own.

    q [B, n, H, C], k and v [B, m, K, C] with m >= n and H a multiple of K -> [B, n, H, C]."""
    n, m = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    square = n == m
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if square else causal_lower_right(n, m),
                                         is_causal=square, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


@dataclass
class Pack:
    """A flat stream of tokens: prompt, completion 1, ..., completion G, next prompt, ... without padding.

    tokens, positions [T]    positions of every completion restart at P: it sees what it would see alone
    groups                   [(P, [R_1 ... R_G]), ...] in stream order
    rows, targets [N]        hidden row that predicts each token carrying loss, and that token.
                             The first token of every completion hangs on the prompt's last row,
                             so `rows` names that row G times
    seq [N]                  which completion of the pack, counted from 0, each of them belongs to
    """
    tokens: torch.Tensor
    positions: torch.Tensor
    groups: list
    rows: torch.Tensor
    targets: torch.Tensor
    seq: torch.Tensor

    @staticmethod
    def build(examples, device="cpu", silent=None):
        """Lay out [(prompt_ids, [completion_ids, ...]), ...].

        silent: for each completion of each prompt, how many of its first tokens carry no loss (default 0).
        SFT uses it for several questions on one document: the document is the prompt, question and answer
        the completion.
        No examples make a stream of one token without loss, for ranks that have nothing to do."""
        tokens, positions, groups, rows, targets, seq = [], [], [], [], [], []
        count = 0
        for e, (prompt, completions) in enumerate(examples or [([0], [])]):
            if not prompt:
                raise UserError("an empty prompt has no row to predict a completion from")
            P, last = len(prompt), len(tokens) + len(prompt) - 1
            tokens += prompt
            positions += range(P)
            groups.append((P, [len(c) for c in completions]))
            for i, completion in enumerate(completions):
                skip, at, R = silent[e][i] if silent else 0, len(tokens), len(completion)
                before = [last] + list(range(at, at + R - 1))  # the row in front of each of its tokens
                rows += before[skip:R]  # [last] alone would be one too many for an empty completion
                targets += completion[skip:]
                seq += [count] * (R - skip)
                tokens += completion
                positions += range(P, P + R)
                count += 1
        return Pack(*(torch.tensor(x, dtype=torch.long, device=device) if x is not groups else x
                      for x in (tokens, positions, groups, rows, targets, seq)))

    def __post_init__(self):
        """Where the stream is cut for attention: `pieces`, each prompt and each completion;
        `own`, all completions of a prompt together, which stand `own_at`;
        and `shared`, their prompts, which stand `shared_at`."""
        pieces, own, shared, own_at, shared_at, at = [], [], [], [], [], 0
        for P, lengths in self.groups:
            R = sum(lengths)
            pieces += [P] + [n for n in lengths if n]
            if R:
                own.append(R)
                shared.append(P)
                shared_at += range(at, at + P)
                own_at += range(at + P, at + P + R)
            at += P + R
        self.pieces, self.own, self.shared = (cut(x, self.tokens.device) for x in (pieces, own, shared))
        if len(self.groups) == 1:  # slices are views, tensors would copy
            self.own_at, self.shared_at = slice(shared[0] if own else at, None), slice(0, pieces[0])
        else:
            self.own_at, self.shared_at = (torch.tensor(x, dtype=torch.long, device=self.tokens.device)
                                           for x in (own_at, shared_at))

    def attend(self, layer, q, k, v):
        """q [T, H, C], k and v [T, K, C] -> [T, H, C]. The prompt's keys serve all its completions, forward
        and backward. The layer's number is for the sampler's Cache, which stands in for a Pack."""
        if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
            return plain_attention(self, q, k, v)
        return PackedAttention.apply(q, k, v, self)


def plain_attention(pack, q, k, v):
    """Pack.attend the obvious way, one piece after the other: the yardstick,
    and fp32 on CUDA, which flash attention lacks."""
    out, at = [], 0
    for P, lengths in pack.groups:
        prompt, at = slice(at, at + P), at + P
        out.append(causal_attention(q[None, prompt], k[None, prompt], v[None, prompt])[0])
        for R in filter(None, lengths):
            own, at = slice(at, at + R), at + R
            keys, values = (torch.cat([x[prompt], x[own]])[None] for x in (k, v))
            out.append(causal_attention(q[None, own], keys, values)[0])
    return torch.cat(out)


class PackedAttention(torch.autograd.Function):
    """Attention of a stream in two calls of a flash kernel, without a copy of any prompt's keys and values.

    A completion attends to itself (a, causal) and to its whole prompt (b, no mask).
    Each call gives an output and, per row and head, the logarithm of its softmax's denominator,
    from which the softmax over both follows:
        lse = log(e^lse_a + e^lse_b)        out = (e^lse_a out_a + e^lse_b out_b) / e^lse
    Backward asks of a row only out, lse and d out: with p = exp(q.k - lse), d v = p^T d out and
    d (q.k) = p (d out.v - d out.out). So each call's backward, given the row's out and lse over both,
    returns its part of the exact gradient, and the parts add up (as in ring attention, arXiv 2310.01889)."""

    @staticmethod
    def forward(ctx, q, k, v, pack):
        out, lse = flash(q, k, v, pack.pieces, pack.pieces, causal=True)            # [T, H, C], [H, T]
        if pack.own[0]:
            own, shared = pack.own_at, pack.shared_at
            out_b, lse_b = flash(q[own], k[shared], v[shared], pack.own, pack.shared, causal=False)
            out[own] = merged(out[own], lse[:, own].T, out_b, lse_b.T)
            lse[:, own] = torch.logaddexp(lse[:, own], lse_b)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pack = pack
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (q, k, v, out, lse), pack = ctx.saved_tensors, ctx.pack
        dq, dk, dv = flash_backward(dout, q, k, v, out, lse, pack.pieces, pack.pieces, causal=True)
        if pack.own[0]:
            own, shared = pack.own_at, pack.shared_at
            dq_b, dk_b, dv_b = flash_backward(dout[own], q[own], k[shared], v[shared], out[own], lse[:, own],
                                              pack.own, pack.shared, causal=False)
            dq[own] += dq_b
            dk[shared] += dk_b
            dv[shared] += dv_b
        return dq, dk, dv, None


def merged(out_a, lse_a, out_b, lse_b):
    """Attention to two sets of keys, from the attention to each: out [..., C], and lse [...] in fp32,
    the logarithm of the sum of e^score. The second weighs e^b / (e^a + e^b) = sigmoid(b - a)."""
    weight = torch.sigmoid(lse_b - lse_a)[..., None]
    return torch.lerp(out_a.to(weight.dtype), out_b.to(weight.dtype), weight).to(out_a.dtype)


def cut(sizes, device):
    """Sizes of consecutive pieces, as a list and as variable-length attention wants them:
    (sizes, [0, s_1, s_1 + s_2, ...])."""
    return sizes, torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)


# forward is public; this is the backward that it registers, called here with an out and lse of our own
varlen_attn_backward = torch.ops.torch_attn._varlen_attn_backward


def takes_varlen(q):
    """Whether `flash` is one variable-length call: a function, so that tests can try that path on a CPU."""
    return q.is_cuda


def flash(q, k, v, q_cut, k_cut, causal):
    """Attention of each piece of q [n, H, C] to the piece of k, v [m, K, C] of the same number ->
    out [n, H, C] and lse [H, n], the logarithm of the sum of e^score over the keys.
    `causal` is for pieces as long as their keys."""
    (q_sizes, q_ends), (k_sizes, k_ends) = q_cut, k_cut
    if takes_varlen(q):
        return varlen_attn(q, k, v, q_ends, k_ends, max(q_sizes), max(k_sizes),
                           return_aux=AuxRequest(lse=True), window_size=(-1, 0 if causal else -1),
                           enable_gqa=True)
    done = []
    for n, *piece in zip(q_sizes, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *folded(causal, *piece), 0.0, causal)
        done.append((unfolded(out, n), unfolded(lse[..., None], n)))
    out, lse = (torch.cat(x) for x in zip(*done))
    return out, lse[..., 0].T


def flash_backward(dout, q, k, v, out, lse, q_cut, k_cut, causal):
    """d (q, k, v) from d out, when out and lse are what `flash` gave, or are over more keys than these."""
    (q_sizes, q_ends), (k_sizes, k_ends) = q_cut, k_cut
    if takes_varlen(q):
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state, for dropout
        return varlen_attn_backward(dout, q, k, v, out, lse.contiguous(), q_ends, k_ends, max(q_sizes),
                                    max(k_sizes), causal, unused, None, [-1, 0 if causal else -1])
    done = []
    rows = (x.split(q_sizes) for x in (dout, q, out, lse.T[..., None]))
    for n, m, dout, q, out, lse, k, v in zip(q_sizes, k_sizes, *rows, k.split(k_sizes), v.split(k_sizes)):
        q, k, v, dout, out, lse = folded(causal, q, k, v, dout, out, lse)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse[..., 0], 0.0, causal)
        done.append([unfolded(x, size) for x, size in zip(grads, (n, m, m))])
    return [torch.cat(x) for x in zip(*done)]


def folded(causal, q, k, v, *like_q):
    """[n, heads, C] -> [1, heads, n, C]. Without a mask the query heads that share a key head are as good as
    rows of it: q becomes [1, K, n H/K, C], and keys are read once for all of them."""
    heads = q.shape[1] if causal else k.shape[1]
    q, *like_q = (x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)[None] for x in (q, *like_q))
    return q, k.transpose(0, 1)[None], v.transpose(0, 1)[None], *like_q


def unfolded(x, n):
    """[1, heads, n g, C] -> [n, heads g, C]."""
    return x[0].unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 2)


def split_groups(groups, limit):
    """Cut a batch into streams of at most `limit` tokens.

    groups [(P, [R_1 ... R_G]), ...] as in Pack.groups -> [[(group, [completions]), ...], ...]: which
    completions of which groups each stream holds, by number and in order. A group is cut only if it alone is
    longer than `limit`: then every part repeats its prompt, and since losses are sums over tokens with
    weights of the whole batch, the gradient is the same.
    Raises UserError if a prompt with one completion is longer than `limit`."""
    streams, room = [], 0
    for g, (P, lengths) in enumerate(groups):
        parts, left = [], 0
        for i, R in enumerate(lengths):
            if P + R > limit:
                raise UserError(f"--micro {limit}: a prompt of {P} tokens with a completion of {R} "
                                f"needs {P + R}")
            if not parts or R > left:
                parts.append([])
                left = limit - P
            parts[-1].append(i)
            left -= R
        for part in parts:
            size = P + sum(lengths[i] for i in part)
            if not streams or size > room:
                streams.append([])
                room = limit
            streams[-1].append((g, part))
            room -= size
    return streams


# ------------------------------------------------------------------------------------------------ transformer

class Linear(nn.Linear):
    """Weights are kept in fp32 for the optimizer and cast to the dtype of the activations
    where they are used."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if not x.is_cpu or x.shape[0] > 64 or weight.numel() < 2**15:
            return F.linear(x, weight, bias)
        # Few rows, as in decoding, and 128 KB of fp32 weights or more: this way round a CPU takes half the
        # time. contiguous: heads are views of it, and attention's kernels take no other layout
        y = F.linear(weight, x).t().contiguous()
        return y if bias is None else y + bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if torch.is_grad_enabled():
            return Normalise.apply(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)  # sampling: a Function's wrapping takes as long as the norm


def rms_norm(x, weight, eps):
    """Rounds as transformers does: to x's dtype before the weight is applied."""
    if not x.is_cpu:
        return weight.to(x.dtype) * F.rms_norm(x, x.shape[-1:], eps=eps)
    h = x.float()  # the same in half as many operations, which decoding feels
    return (h * inverse_rms(h, eps)).to(x.dtype).mul_(weight.to(x.dtype))


def inverse_rms(h, eps):
    """1 / sqrt(mean(h^2) + eps) of each row [..., 1]."""
    size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return torch.full_like(size, eps).addcmul_(size, size, value=1 / h.shape[-1]).rsqrt_()


class Normalise(torch.autograd.Function):
    """RMSNorm for autograd, which would keep three fp32 copies of x:
    we keep x, and normalise it again in backward.

    With n = x / rms(x) and u = weight * dy:
        dx = (u - n mean(u n)) / rms(x)        dweight = sum over rows of dy n"""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        h = x.float()
        scale = inverse_rms(h, ctx.eps)
        n = h * scale
        dweight = (dy * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        u = dy * weight.to(n.dtype)
        return u.sub_(n.mul_((u * n).mean(-1, keepdim=True))).mul_(scale).to(x.dtype), dweight, None


def rope_frequencies(config):
    """(frequencies [C/2], factor on cos and sin), as transformers computes them.

    Angle of position m in pair i is m * theta^(-2i/C); scaling changes the slow pairs so that longer texts
    stay within the angles seen in training: `linear` divides all, `yarn` (arXiv 2309.00071) and `llama3`
    blend by wavelength."""
    C, base, s = config.head_dim, config.rope_theta, config.rope_scaling
    freq = 1.0 / base ** (torch.arange(0, C, 2, device="cpu").float() / C)
    if s is None:
        return freq, 1.0
    factor = s["factor"]
    if s["rope_type"] == "linear":
        return freq / factor, 1.0
    original = s["original_max_position_embeddings"]
    if s["rope_type"] == "llama3":
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = original * freq / (2 * math.pi)            # how often a pair turns within the original length
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pair, unchanged; 0: slow pair, divided
        return keep * freq + (1 - keep) * freq / factor, 1.0

    def pair_that_turns(n):  # index of the pair that turns n times in the original length
        return C * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base))

    def mscale(m):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = pair_that_turns(s.get("beta_fast") or 32), pair_that_turns(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, C - 1)
    ramp = ((torch.arange(C // 2, device="cpu") - low) / (high - low or 0.001)).clamp(0, 1)
    attention = s.get("attention_factor")
    if attention is None:
        m, of = s.get("mscale"), s.get("mscale_all_dim")
        attention = mscale(m) / mscale(of) if m and of else mscale(1)
    return freq / factor * ramp + freq * (1 - ramp), attention


def rotate(x, cos, sin):
    """Rotary position embedding, halves convention: (a, b) -> (a cos - b sin, b cos + a sin).

    x [T, heads, C]; cos = [cos, cos] and sin = [-sin, sin], each [T, 1, C] in fp32."""
    h = x.float()
    return h.roll(h.shape[-1] // 2, -1).mul_(sin).addcmul_(h, cos).to(x.dtype)  # (b, a) sin + (a, b) cos


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, queries, keys = (c.head_dim, c.num_attention_heads * c.head_dim,
                                        c.num_key_value_heads * c.head_dim)
        bias = c.attention_bias or c.model_type == "qwen2"
        self.q_proj = Linear(c.hidden_size, queries, bias)
        self.k_proj = Linear(c.hidden_size, keys, bias)
        self.v_proj = Linear(c.hidden_size, keys, bias)
        self.o_proj = Linear(queries, c.hidden_size, c.attention_bias and c.model_type != "qwen2")
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps),
                                        RMSNorm(c.head_dim, c.rms_norm_eps))
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, attend, asking):
        """x [T, D] -> [n, D]: only the rows that `asking` picks ask, keys and values are those of all."""
        q, k, v = (h.view(-1, h.shape[1] // self.head_dim, self.head_dim)          # [n or T, heads, C]
                   for h in (self.q_proj(asking(x)), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(self.q_norm(q), asking(cos), asking(sin)), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x), inplace=not torch.is_grad_enabled())
        return self.down_proj(gate * self.up_proj(x))


MLP_CHUNK = 2**26  # entries of one [rows, intermediate_size] buffer of an MLP


def mlp_rows(intermediate_size, device_type, grad):
    """Longer streams go through an MLP in chunks of so many rows.

    For Qwen3-1.7B in bf16 a buffer is 128 MB, and 128K tokens are 13 chunks; in one piece it is 1.6 GB, 5
    times. Without gradients nothing is made a second time: on a CPU chunks that fit its caches are faster."""
    return 512 if device_type == "cpu" and not grad else max(1, MLP_CHUNK // intermediate_size)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend, asking):
        x = asking(x) + self.self_attn(self.input_layernorm(x), cos, sin, attend, asking)
        chunk = mlp_rows(self.mlp.gate_proj.out_features, x.device.type, torch.is_grad_enabled())
        if x.shape[0] <= chunk:
            return self.second_half(x)
        # a chunk's buffers are dropped after it, and made again when its turn comes in backward
        return torch.cat([again_in_backward(self.second_half, part) for part in x.split(chunk)])

    def second_half(self, x):
        return x + self.mlp(self.post_attention_layernorm(x))


def again_in_backward(f, *args):
    """f(*args), of which nothing but the arguments is kept: backward computes it a second time.
    Gradients are the same."""
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


class Transformer(nn.Module):
    """Decoder up to the last hidden state.
    The head is applied outside, and only to the rows that need it (kernels.py)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None           # None: the weights'. bf16 with fp32 weights is mixed precision
        self.n_vocab = config.vocab_size    # rows of the head in use; load() lowers it to the tokenizer's ids
        self.checkpointing = False          # keep only the input of each layer for backward; plan() decides
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (None if config.tie_word_embeddings
                        else Linear(config.hidden_size, config.vocab_size, bias=False))
        self.frequencies, self.rope_factor = rope_frequencies(config)

    @property
    def head_weight(self):
        """[V, D] in the dtype of the activations; the embedding itself when tied."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight.to(self.compute_dtype or weight.dtype)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def forward(self, pack, cache=None, rows=None):
        """Hidden states [T, D] of pack.tokens at pack.positions. Who sees whom is decided by `cache.attend`
        while sampling (rollout.py) and by `pack.attend` otherwise.

        rows (of prefill): which hidden states [n, D] are wanted, those of last tokens. Of all others the last
        layer then makes keys and values, and no more."""
        attend = (cache or pack).attend
        x = self.embed_tokens(pack.tokens)                                               # [T, D]
        if self.frequencies.device != x.device:  # once; not a buffer, which .to(bfloat16) would round
            self.frequencies = self.frequencies.to(x.device)
        x = x.to(self.compute_dtype or x.dtype)
        angle = pack.positions[:, None, None].float() * self.frequencies                 # [T, 1, C/2]
        cos, sin = angle.cos() * self.rope_factor, angle.sin() * self.rope_factor
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)                 # [T, 1, C]
        call = (again_in_backward if self.checkpointing and torch.is_grad_enabled()
                else lambda layer, *args: layer(*args))
        for i, layer in enumerate(self.layers):
            every = rows is None or layer is not self.layers[-1]
            asking = (lambda t: t) if every else (lambda t: t[rows])
            x = call(layer, x, cos, sin, functools.partial(attend, i), asking)
        return self.norm(x)

    def logits(self, tokens):
        """All logits [T, V] of one plain sequence: for tests and small experiments."""
        pack = Pack.build([(list(tokens), [])], self.device)
        hidden = self(pack)
        return F.linear(hidden, self.head_weight).float()


def new_model(config, seed):
    """Random weights N(0, 1 / (4 fan_in)), the same for a seed on any machine.
    That is the usual 0.02 at a width of 600; models as small as ours start too flat with 0.02,
    and with 1 / fan_in their blocks drown the embeddings."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return model


# ------------------------------------------------------------------------------------------------ checkpoints

SHARD_BYTES = 5 * 10**9


def shard_files(path):
    """The safetensors files of a checkpoint directory: those its index names, or model.safetensors."""
    index, names, why = os.path.join(path, "model.safetensors.index.json"), {"model.safetensors"}, ""
    if os.path.lexists(index):
        with laid_out_as("one with a weight_map: tensor name -> name of a safetensors file beside it", index):
            names = {*read_json(index)["weight_map"].values()}
            if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
                raise ValueError(names)
        why = f", which {os.path.basename(index)} names"
    for name in names:
        if not os.path.isfile(os.path.join(path, name)):
            raise UserError(f"{path} has no {name}{why}")
    return [os.path.join(path, name) for name in sorted(names)]


def stored_name(parameter):
    """Name in Hugging Face's files of a parameter of Transformer."""
    return parameter if parameter == "lm_head.weight" else f"model.{parameter}"


def load(path, dtype=torch.float32, device="cpu", sharded=False, offload=False):
    """(Transformer, Tokenizer) of a Hugging Face directory. Names and shapes are checked before memory is
    taken, then each tensor goes from the file straight to its place, so the peak is the model and one shard.
    sharded: under torchrun, every rank reads and keeps its own rows of each tensor only.
    offload: the weights wait in CPU memory for their use on `device`.

    Raises UserError for anything missing, extra, of the wrong shape or unsupported."""
    if not os.path.isdir(path):
        raise UserError(f"{path} is not a directory with a checkpoint "
                        "(config.json, tokenizer.json, *.safetensors)")
    config, tokenizer = Config.from_dir(path), Tokenizer.from_dir(path)
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(f"{path}: the tokenizer's ids go up to {tokenizer.n_vocab - 1}, "
                        f"the embedding has only {config.vocab_size} rows")
    with torch.device("meta"):
        model = Transformer(config)
    model.n_vocab = tokenizer.n_vocab
    expected = {stored_name(name): tuple(p.shape) for name, p in model.named_parameters()}

    found, files = {}, shard_files(path)
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if name in found:
                        raise UserError(f"{file}: tensor {name} is in another file too")
                    tensor = f.get_slice(name)
                    found[name] = tuple(tensor.get_shape())
                    if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                        raise UserError(f"{file}: tensor {name} is {tensor.get_dtype()}, "
                                        "expected F32, F16 or BF16")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read, is it truncated? ({str(error)!r:.200})") from None
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files store the tied head a second time: compared below
    found = {name: shape for name, shape in found.items() if not name.endswith("rotary_emb.inv_freq")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"{path}: tensor {name} is {found.get(name, 'missing')}, expected "
                            f"{expected.get(name, 'no such tensor')}")

    sharded = sharded and dist.is_initialized()
    if sharded:
        shard(model.to(dtype), device, offload).to_empty(device="cpu" if offload else device)
    second_head = None
    for file in files:
        with safe_open(file, framework="pt", device="cpu" if sharded or offload else str(device)) as f:
            tensors = {name.removeprefix("model."): name for name in f.keys() & expected.keys()}
            if sharded:
                for name, parameter in model.named_parameters():
                    if name in tensors:
                        read_part(f, tensors[name], parameter.detach())
            else:
                model.load_state_dict({name: f.get_tensor(stored).to(dtype)
                                       for name, stored in tensors.items()}, strict=False, assign=True)
            if config.tie_word_embeddings and "lm_head.weight" in f.keys():
                second_head = file
    if second_head:
        embedding = model.embed_tokens.weight.detach()
        stored = torch.empty_like(embedding)
        with safe_open(second_head, framework="pt") as f:
            read_part(f, "lm_head.weight", stored)
        if not torch.equal(own_part(stored), own_part(embedding)):
            raise UserError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
    return model, tokenizer


def own_part(tensor):
    """The rows of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_part(file, name, tensor):
    """Fill a tensor from an open safetensors file; of one that is sharded, this rank's rows:
    FSDP2 deals them as chunk() does."""
    if isinstance(tensor, DTensor):
        first = min(rank() * -(-len(tensor) // world()), len(tensor))
        own_part(tensor).copy_(file.get_slice(name)[first:first + len(own_part(tensor))])
    else:
        tensor.copy_(file.get_tensor(name))


def save(path, model, tokenizer):
    """Put a Hugging Face directory at `path`: config, tokenizer files, safetensors in shards of at most 5 GB.

    All is written beside, then moved in, config.json last: while a directory has one, it is whole.
    Other files stay. Under torchrun every rank calls this, and rank 0 writes."""
    path = os.path.normpath(path)
    new = os.path.join(path, ".writing")
    write_checkpoint(new, model, tokenizer)
    if rank() == 0:
        with writing(path):
            old = [name for name in os.listdir(path) if ".safetensors" in name]
            for name in [n for n in ["config.json", *old] if os.path.exists(os.path.join(path, n))]:
                os.remove(os.path.join(path, name))
            for name in sorted(os.listdir(new), key=lambda name: name == "config.json"):
                os.replace(os.path.join(new, name), os.path.join(path, name))
            os.rmdir(new)
            flush_to_disk(path)
    barrier()


def write_checkpoint(path, model, tokenizer):
    """Write the files of `save` into the new directory `path`."""
    parameters = {stored_name(name): p.detach() for name, p in model.named_parameters()}
    names = write_tensors(path, "model", parameters)
    if rank() > 0:
        return
    stops = dict(bos_token_id=(tokenizer.bos or [None])[0], eos_token_id=tokenizer.stop_ids or None)
    dtype = next(iter(parameters.values())).dtype
    files = {"config.json": model.config.to_dict(dtype) | stops, "generation_config.json": stops}
    if len(set(names.values())) > 1:
        files["model.safetensors.index.json"] = dict(
            metadata=dict(total_size=sum(p.numel() * p.element_size() for p in parameters.values())),
            weight_map=names)
    files = {name: json.dumps(content, indent=2).encode() for name, content in files.items()}
    for name, content in (files | tokenizer.files).items():
        write_file(os.path.join(path, name), content)


def write_tensors(path, stem, tensors):
    """Write named tensors as path/stem.safetensors, or in shards of at most SHARD_BYTES -> {name: file}.

    The parts that other ranks hold are gathered tensor by tensor;
    only rank 0 keeps them, one shard at a time, and writes."""
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(names, shards):
        held = {}
        for name in members:
            tensor = full(tensors[name])
            if rank() == 0:
                held[name] = tensor.cpu().contiguous()
        if rank() == 0:
            with writing(path):
                os.makedirs(path, exist_ok=True)
                file = os.path.join(path, file)
                save_file(held, file, {"format": "pt"})
                os.chmod(file, 0o666 & ~UMASK)  # safetensors makes files that only their owner can read
                flush_to_disk(file)
    return {name: file for file, members in zip(names, shards) for name in members}


def write_file(path, content):
    with writing(os.path.dirname(path)), open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def flush_to_disk(path):
    """fsync of a file or directory that is already closed."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def writing(path):
    """Turn what a disk complains about into a UserError;
    the half-written rest in a .writing directory gives its space back."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if path.endswith(".writing"):
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(f"cannot write to {path}: {error}; what was saved before is untouched") from None


# --------------------------------------------------------------------------------------------- many processes

def init():
    """The device of this process. Under torchrun it joins the others: NCCL with CUDA, gloo without."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # a rank that waits longer than this for the others ends the run: they may be dead on another node
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=60))
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    gather(None)


def gather(value):
    """A picklable value of every rank, in their order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def add_up(sums):
    """{name: number} added up over the ranks."""
    parts = gather(sums)
    return {name: sum(part[name] for part in parts) for name in sums}


def spread(costs):
    """Deal out jobs, longest first, each to the rank with the least work so far, so that all finish together
    -> indices of each rank."""
    shares, loads = [[] for _ in range(world())], [0] * world()
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += costs[i]
    return [sorted(share) for share in shares]


def share_out(work, costs):
    """work(indices) -> a result for each: every rank does its share, and all get all results, in order."""
    mine = spread(costs)[rank()]
    results = {i: result for part in gather(list(zip(mine, work(mine)))) for i, result in part}
    return [results[i] for i in range(len(costs))]


def my_streams(groups, micro):
    """This rank's share of the streams that split_groups(groups, micro) makes, cut so that there is work for
    all ranks, and filled up with empty ones: with FSDP2 all must run the model equally often, for each gives
    its part of the weights."""
    tokens = [P + sum(lengths) for P, lengths in groups]
    streams = split_groups(groups, min(micro, max([-(-sum(tokens) // world()), *tokens])))
    costs = [sum(groups[g][0] + sum(groups[g][1][i] for i in members) for g, members in stream)
             for stream in streams]
    shares = spread(costs)
    mine = [streams[i] for i in shares[rank()]]
    return mine + [[]] * (max(map(len, shares)) - len(mine))


def shard(model, device, offload=False):
    """FSDP2: every rank keeps a part of each matrix; a layer's matrices are gathered while it is computed.

    The outermost group (embedding, last norm, head) stays whole from its forward to its backward: the head is
    used outside the model's forward. Gradients are summed over the ranks in fp32, not averaged: our losses
    are sums over a global count."""
    mesh = dist.init_device_mesh(device.type, (world(),))
    cuda = device.type == "cuda"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cuda else None, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # RoPE tables stay fp32
    home = CPUOffloadPolicy() if offload and cuda else OffloadPolicy()  # where parts wait; FSDP2 fetches them
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=home)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=home, reshard_after_forward=False)
    for module in [*model.layers, model]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other kind
    return model


def full(tensor):
    """The whole of a tensor that may be sharded; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole(model):
    """The model as the sampler wants it: all weights on this device, in the dtype of the arithmetic.
    A copy for as long as the block lasts; the model itself where it already is like that."""
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    if not dist.is_initialized() and dtype == model.embed_tokens.weight.dtype:
        yield model
        return
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.n_vocab = model.n_vocab
    copy.load_state_dict({name: full(p.detach().to(dtype)) for name, p in model.named_parameters()},
                         assign=True)
    try:
        yield copy
    finally:
        copy.to("meta")  # the caller's name for it lives on, its memory must not


def frozen_dtype(device):
    """Of a model that is not trained: bf16, on the CPU fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_student(path, device):
    """fp32 weights for the optimizer, sharded under torchrun; on CUDA the arithmetic is bf16."""
    model, tokenizer = load(path, torch.float32, device, sharded=True)
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else None
    return model, tokenizer


def load_teacher(path, device, tokenizer, offload=False):
    """A frozen model whose tokenizer must give the same ids as the student's.
    With offload its weights stay in CPU memory between uses, see `on_device`."""
    teacher, its_tokenizer = load(path, frozen_dtype(device), device, sharded=True, offload=offload)
    if not tokenizer.same_encoding(its_tokenizer):
        raise UserError(f"the teacher {path} encodes text otherwise than the student "
                        f"({its_tokenizer.n_vocab} and {tokenizer.n_vocab} ids): the KL between them has no "
                        "meaning; choose a teacher of the same family")
    return teacher.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- memory

def n_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def memory_needed(config, stream, rows, kind="cpu", checkpointing=False, teacher=None, offload=False,
                  scored=0, slots=0, cached=0, world=1):
    """Peak bytes of the three phases of a step, {"sampling", "scoring", "update"}, each {what: bytes}.

    config, teacher   shapes of the student and of the teacher (None: there is none)
    stream, rows      tokens T of the largest stream, and N of them that carry loss
    scored            completion tokens of the batch, whose teacher_hidden [scored, Dt] waits for the update
    slots, cached     completions sampled at a time, and positions of their keys and values
    kind, world       "cpu": everything in fp32; "cuda": b = 2 bytes an entry where the optimizer is not
                      concerned. FSDP2 divides weights, gradients and optimizer state by the number of ranks

    Of n weights the optimizer needs 12 n bytes (fp32 weight, two moments) and 4 n for gradients.
    Of a layer autograd keeps
        E = 4 D + 3 H C + 3 K C + 4 I  entries a token: inputs of its matmuls, norms, attention and activation
    and its backward works on W = 3 D + 2 I more, where I is the intermediate size, of at most mlp_rows(I)
    tokens at a time. With L layers the stream takes
        T b L E      and then the larger of  T b W        and the head,      or with gradient checkpointing
        T b L D      and then the larger of  T b (E + W)  and the head,
    where the head is 3 buffers of a chunk of logits (kernels.CHUNK_BYTES), and b (2 T + 3 N) D of hidden
    states. In either case two [V, D] gradients of the embedding and the head. In bf16 the cast weights of
    what is kept count too. Sampling holds the cache, 2 L K C b bytes a position, and 16 bytes for each of its
    logits. Tests compare this with measured peaks."""
    b, fp32 = (2, 4) if kind == "cuda" else (4, 4)
    n, D, V, I, L = (n_parameters(config) / world, config.hidden_size, config.vocab_size,
                     config.intermediate_size, config.num_hidden_layers)
    HC, KC = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    I *= min(1, mlp_rows(I, kind, grad=True) / stream)                               # mean over the stream
    layer, work = stream * b * (4 * D + 3 * HC + 3 * KC + 4 * I), stream * b * (3 * D + 2 * I)
    layer += n / L * b if b == 2 else 0
    head = 3 * min(CHUNK_BYTES[kind], fp32 * rows * V) + b * (2 * stream + 3 * rows) * D
    state = {"weights and optimizer": 12 * n}
    kept = stream * b * L * D if checkpointing else L * layer
    peak = max(layer + work, head) if checkpointing else max(work, head)
    update = state | {"gradients": 4 * n, "activations": kept + peak + 2 * fp32 * V * D}
    sampling = state | {"cache": cached * 2 * L * KC * b, "logits": slots * V * 16}
    scoring = dict(state)
    if b == 2:
        sampling["weights in bf16"] = 2 * n * world
    if world > 1:  # two layers, the embedding and the head are whole at a time
        update["gathered"] = scoring["gathered"] = 2 * b * (n * world / L + V * D)
    if teacher is not None:
        t, Dt = n_parameters(teacher), teacher.hidden_size
        heads = (teacher.num_attention_heads + teacher.num_key_value_heads) * teacher.head_dim
        weights, waiting = {"teacher": t * b / world}, {"teacher's hidden states": scored * Dt * b}
        It = teacher.intermediate_size
        It *= min(1, mlp_rows(It, kind, grad=False) / stream)
        if world > 1:  # two layers, and from the first pass on embedding and head
            head_whole = 2 * b * teacher.vocab_size * Dt
            scoring["teacher gathered"], update["teacher gathered"] = (
                head_whole + 2 * b * t / teacher.num_hidden_layers, head_whole)
        scoring |= weights | waiting | {"teacher's pass": stream * b * (4 * Dt + 4 * heads + 3 * It)}
        update |= waiting | ({"teacher's head": teacher.vocab_size * Dt * b} if offload else weights)
        sampling |= {} if offload else weights
    return dict(sampling=sampling, scoring=scoring, update=update)


def read_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def available_memory(device, models=()):
    """Bytes that a run may use on `device`, with those that `models` hold there already;
    inf where nobody can tell."""
    held = sum(own_part(p).nbytes for m in models for p in m.parameters() if p.device.type == device.type)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused + held
    limits = []
    try:
        limits.append(int(re.search(r"MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"))[1]) * 1024)
        limit, used, stat = (read_text(f"/sys/fs/cgroup/memory.{name}")
                             for name in ("max", "current", "stat"))
        limits.append(int(limit) - int(used)                                # a container's
                      + int(re.search(r"^file (\d+)", stat, re.M)[1]))      # cached files go
    except (OSError, TypeError, ValueError):  # not Linux, or no limit ("max")
        pass
    return min(limits, default=math.inf) / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + held  # ranks share it


def plan(model, cfg, device, teacher=None, kv_tokens=2**18):
    """Say what the run will need, before it starts, and turn gradient checkpointing on if it must.
    -> the sentence.

    cfg has micro, ctx and batch, and where completions are sampled group and max_new.
    Raises UserError if it cannot fit."""
    group, max_new, offload = (getattr(cfg, name, 0) for name in ("group", "max_new", "teacher_offload"))
    batch, longest = -(-cfg.batch // world()), cfg.ctx + max(group - 1, 0) * max_new  # of the longest group
    stream = min(cfg.micro, batch * longest) if group else cfg.micro  # several questions may share a document
    scored = batch * group * max_new
    wave = max(1, min(batch, kv_tokens // longest)) if group else 0     # prompts that are sampled at a time
    sizes = dict(stream=stream, rows=min(stream, scored) if group else stream, kind=device.type,
                 scored=scored, teacher=teacher and teacher.config, offload=offload and device.type == "cuda",
                 slots=wave * group, cached=wave * longest, world=world())
    room = available_memory(device, [model] + ([teacher] if teacher else []))
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        phases = memory_needed(model.config, checkpointing=checkpointing, **sizes)
        parts = max(phases.values(), key=lambda parts: sum(parts.values()))
        need = sum(parts.values())
        if need < 0.9 * room:  # the rest for what is too small to be counted, and for fragments
            break
    text = lambda size: f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    listed = ", ".join(f"{what} {text(size)}" for what, size in parts.items() if size >= 1e9)
    sentence = f"this needs about {text(need)} of {text(room)}" + f" ({listed})" * bool(listed)
    if need >= 0.9 * room:
        flags = [f"--micro {cfg.micro}", f"--ctx {cfg.ctx}"] + [f"--group {group}"] * (group > 1)
        tip = ("; use --teacher-offload" if teacher is not None and not offload and device.type == "cuda"
               else "")
        raise UserError(f"{sentence}: lower {', '.join(flags)}{tip}, or take a smaller model")
    return sentence + ", with gradient checkpointing" * model.checkpointing


@contextmanager
def on_device(model, device):
    """Lend the weights of a frozen model (or None) to `device`.

    For a teacher that lives in CPU memory between uses: its weights never change, so they need no way back; a
    reference to its head, taken inside, keeps that on the device. A model that is there already costs
    nothing, nor does a sharded one, whose parts FSDP2 moves."""
    parts = [] if model is None or dist.is_initialized() else list(model.parameters())
    home = [p.data for p in parts]
    try:
        for p in parts:
            p.data = p.data.to(device)
        yield
    finally:
        for p, data in zip(parts, home):
            p.data = data


def longest_context(config):
    """How many positions a model knows: those of its config, or those its RoPE scaling stretches them to."""
    scaling = config.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * scaling.get("factor", 1)))


def check_context(ctx, *configs):
    """Refuse a --ctx beyond the positions of a model."""
    for config in configs:
        if ctx > longest_context(config):
            raise UserError(f"--ctx {ctx}: a model here knows {longest_context(config)} positions "
                            "(max_position_embeddings, or what its rope_scaling makes of them)")


# ---------------------------------------------------------------------------------------------- training runs

UMASK = os.umask(0)
os.umask(UMASK)  # there is no other way to read it
MAX_SKIPPED = 5  # steps with a loss or gradient that is not finite, until a run gives up
# flags that change no result
NO_MATTER = {"out", "micro", "save_every", "resume", "until", "plot", "seeds", "teacher_offload"}


def adamw(model, lr, weight_decay=0.0):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay,
                             fused=True)


def lr_at(step, cfg):
    """Learning rate at a step: linear warm-up, then constant (the paper) or a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(cfg.warmup, 1))
    if cfg.schedule == "cosine":
        return cfg.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / max(cfg.steps, 1)))
    return cfg.lr * warm


class Log:
    """metrics.jsonl of a directory that one run at a time may use: what was run, then rows. Rank 0 writes."""

    def __init__(self, cfg, what):
        """Look, and write nothing yet. Refuses the directory of a run with another configuration,
        and one that is not ours."""
        self.cfg, self.what, self.path = cfg, what, os.path.join(cfg.out, "metrics.jsonl")
        self.config = dataclasses.asdict(cfg)
        if rank() > 0 or not os.path.isdir(cfg.out):
            return
        if not os.path.exists(self.path):
            if set(os.listdir(cfg.out)) - {".lock", "metrics.jsonl.writing"}:  # left by a run killed at start
                raise UserError(f"{cfg.out} is not empty and holds no run of ours: choose another --out")
            return
        with open(self.path, "rb") as f:
            first = f.readline()
        try:
            before = json.loads(first)["config"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is not ours: choose another --out, or move it away") from None
        changed = [f"{k}: {before.get(k)!r} there, {v!r} now" for k, v in self.config.items()
                   if k not in NO_MATTER and before.get(k) != v]
        if changed:
            raise UserError(f"{cfg.out} holds a run of another configuration ({'; '.join(changed)}): "
                            "choose another --out, or delete it")

    def begin(self, keep, remove=()):
        """Lock the directory, remove those files of before, and open the log with those of its rows
        for which keep(row)."""
        if rank() > 0:
            return
        with writing(self.cfg.out):
            os.makedirs(self.cfg.out, exist_ok=True)
            self.lock = open(os.path.join(self.cfg.out, ".lock"), "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of however the process ends
            except BlockingIOError:
                raise UserError(f"another run is writing to {self.cfg.out}: "
                                "choose another --out, or wait") from None
            for path in [os.path.join(self.cfg.out, name) for name in remove]:
                if os.path.exists(path):
                    os.remove(path)
        head = dict(what=self.what, command=sys.argv, config=self.config, torch=torch.__version__,
                    numpy=np.__version__, python=sys.version.split()[0],
                    device=torch.cuda.get_device_name() if torch.cuda.is_available()
                    else f"cpu, {torch.get_num_threads()} threads",
                    world=world(), time=time.strftime("%Y-%m-%d %H:%M:%S"))
        write_rows(self.path, [head, *filter(keep, read_rows(self.path)[1:])])
        self.file = open(self.path, "a", encoding="utf-8")

    def __call__(self, row):
        if rank() == 0:
            with writing(self.cfg.out):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()

    def close(self):
        if rank() == 0:
            self.file.close()
            os.remove(self.lock.name)
            self.lock.close()


def read_rows(path):
    """The rows of a JSONL file of ours; a last line that a killed run left unfinished is dropped."""
    rows = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
    return rows


def write_rows(path, rows):
    """Put a JSONL file of ours in place, whole or not at all."""
    write_file(path + ".writing", "".join(json.dumps(row) + "\n" for row in rows).encode())
    os.replace(path + ".writing", path)


class Run:
    """A training run in cfg.out: its log, the checkpoints it goes on from, its end by signal or by success.

        run = Run(cfg, "sft")                        looks at cfg.out, and takes nothing yet
        if run.finished: return
        model, tokenizer = load_student(run.source, device)
        run.begin(model, tokenizer, optimizer)       from here on the directory is ours
        for step in run.steps():
            ...                                      gradients
            done = run.update(loss, ...)             the optimizer's step
            run.log(dict(loss=loss, **done))
        run.finish()                                 cfg.out is a Hugging Face directory now

    Whatever a step draws depends on (seed, step) alone, so a checkpoint is the model, the optimizer and a
    number. Model and optimizer are stored whole, in safetensors: any number of ranks can go on from them."""

    def __init__(self, cfg, what, watch=None):
        """watch(step, model, tokenizer) is called by all ranks every --save-every steps, after the checkpoint
        is written; by a run that goes on from there again."""
        self.cfg, self.what, self.log_file, self.watch = cfg, what, Log(cfg, what), watch
        self.step = self.skipped = 0
        # rank 0 looks: it may be writing already when the others come here
        self.finished, self.checkpoint = gather(self._look() if rank() == 0 else None)[0]
        self.source = self.checkpoint or cfg.model  # where the weights come from
        if self.finished and rank() == 0:
            print(f"{cfg.out} is finished: nothing to do (--no-resume trains it anew)", file=sys.stderr)

    def _look(self):
        """(whether the run has ended, path of the newest checkpoint or None).
        A name without .writing is a whole checkpoint."""
        if not self.cfg.resume or not os.path.exists(self.log_file.path):
            return False, None
        if os.path.exists(os.path.join(self.cfg.out, "config.json")):
            with writing(self.cfg.out):
                self._prune(None)  # if it was killed between its last two acts
            return True, None
        steps = sorted((n for n in os.listdir(self.cfg.out) if re.fullmatch(r"step-\d{6,}", n)),
                       key=lambda n: int(n[5:]))
        return False, os.path.join(self.cfg.out, steps[-1]) if steps else None

    def begin(self, model, tokenizer, optimizer):
        """Take the directory, and go on from the checkpoint if there is one."""
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        if self.checkpoint:
            self._restore()
        if rank() == 0 and not self.checkpoint:
            self._check_disk()
        self.log_file.begin(keep=lambda row: row.get("step", self.step) < self.step,
                            remove=() if self.checkpoint else ("config.json", "nonfinite.jsonl"))
        if rank() == 0:
            with writing(self.cfg.out):
                self._prune(self.checkpoint)
            self._check_disk()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        barrier()

    def steps(self):
        """The steps that are left. Between them: checkpoints,
        and an end if SIGTERM or SIGINT came (twice: at once)."""
        stop, since = [], 0.0

        def on_signal(number, frame):
            nonlocal since
            # a scheduler signals torchrun and us, and torchrun passes its own on: that is one signal, not two
            if stop and time.monotonic() - since < 0.5:
                return
            since = time.monotonic()
            if stop:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            stop.append(number)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(range(self.step, self.cfg.steps), desc=f"{self.what:8} {self.cfg.out}",
                        initial=self.step, total=self.cfg.steps, disable=rank() > 0)
        try:
            for step in self.bar:
                if self.watch and step and step % self.cfg.save_every == 0:
                    self.watch(step, self.model, self.tokenizer)
                yield step
                self.step = step + 1
                stopped = [number for numbers in gather(stop) for number in numbers]
                if stopped or self.step % self.cfg.save_every == 0 and self.step < self.cfg.steps:
                    self._save_checkpoint()
                if stopped:
                    self.bar.close()
                    self.log_file.close()
                    name = signal.Signals(stopped[0]).name
                    if rank() == 0:
                        print(f"{name}: stopped after step {self.step} of {self.cfg.steps}; "
                              f"the same command goes on from {self.checkpoint}", file=sys.stderr)
                    sys.exit(128 + stopped[0])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def update(self, loss, suspects, examples):
        """Clip the gradient and step the optimizer -> what the log says of it:
        grad_norm (before clipping), lr, skipped.

        A loss (summed over all ranks) or norm that is not finite skips the step, and the ids of examples that
        may be the cause go to nonfinite.jsonl: suspects, those in this rank's streams of such a loss; if no
        rank has any, all examples of the step. Raises UserError when that has happened MAX_SKIPPED times."""
        lr = self.optimizer.param_groups[0]["lr"] = lr_at(self.step, self.cfg)
        norm = full(nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)).item()
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
            ids = [i for part in gather(suspects) for i in part] or examples
            path = os.path.join(self.cfg.out, "nonfinite.jsonl")
            if rank() == 0:
                with writing(self.cfg.out), open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(dict(step=self.step, loss=loss, grad_norm=norm, examples=ids)) + "\n")
            if self.skipped == MAX_SKIPPED:
                raise UserError(f"step {self.step}: loss {loss}, gradient norm {norm}, for the "
                                f"{self.skipped}th time: lower --lr (with another --out), "
                                f"or look at the examples named in {path}")
        self.optimizer.zero_grad()
        return dict(grad_norm=norm, lr=lr, skipped=self.skipped)

    def log(self, row):
        self.log_file(dict(step=self.step, **row, memory_gb=high_water(self.model.device.type) / 1e9))

    def finish(self):
        save(self.cfg.out, self.model, self.tokenizer)
        if rank() == 0:
            self._prune(None)
            self.log_file.close()
        barrier()

    def _check_disk(self):
        """A checkpoint is the weights and two moments. Two of them exist for a moment, and at the end the
        weights once more: 7 times the weights, or 4 if one checkpoint is there already."""
        place = os.path.abspath(self.cfg.out)
        while not os.path.exists(place):
            place = os.path.dirname(place)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        need, free = (4 if self.checkpoint else 7) * size, shutil.disk_usage(place).free
        if need > free:
            raise UserError(f"{self.cfg.out}: checkpoints need {need / 1e9:.1f} GB of disk, "
                            f"{free / 1e9:.1f} GB are free")

    def _save_checkpoint(self):
        path = os.path.join(self.cfg.out, f"step-{self.step:06d}")
        new = path + ".writing"
        write_checkpoint(new, self.model, self.tokenizer)
        state = {f"{name}:{key}": value for name, p in self.model.named_parameters()
                 for key, value in self.optimizer.state[p].items()}
        write_tensors(new, "optimizer", state)
        if rank() == 0:
            numbers = dict(step=self.step, skipped=self.skipped, tensors=sorted(state))
            write_file(os.path.join(new, "state.json"), json.dumps(numbers).encode())
            with writing(new):
                flush_to_disk(new)
                os.rename(new, path)
                flush_to_disk(self.cfg.out)
                self._prune(path)
        self.checkpoint = path
        barrier()

    def _prune(self, kept):
        """Remove checkpoints and half-written ones, except `kept`."""
        for name in sorted(os.listdir(self.cfg.out), reverse=True):  # step-000020.writing before step-000020
            path = os.path.join(self.cfg.out, name)
            if path != kept and re.fullmatch(r"step-\d{6,}(\.writing)?|\.writing", name):
                if not name.endswith(".writing"):  # half removed it must not look whole
                    os.rename(path, path + ".writing")
                    path += ".writing"
                shutil.rmtree(path)

    def _restore(self):
        """The optimizer's state and the counts of self.checkpoint,
        which must be all there and belong to cfg.model."""
        advice = f"; delete {self.checkpoint} to start anew"
        texts = [[files.get(name)
                  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
                 for files in (self.tokenizer.files, Tokenizer.from_dir(self.cfg.model).files)]
        if Config.from_dir(self.checkpoint) != Config.from_dir(self.cfg.model) or texts[0] != texts[1]:
            raise UserError(f"{self.checkpoint} was made from another model than "
                            f"--model {self.cfg.model}{advice}")
        numbers = read_json(os.path.join(self.checkpoint, "state.json"))
        self.step, self.skipped, expected = (numbers.get(name) for name in ("step", "skipped", "tensors"))
        if (type(self.step), type(self.skipped), type(expected)) != (int, int, list) or not (
                self.checkpoint.endswith(f"step-{self.step:06d}") and 0 <= self.skipped < MAX_SKIPPED):
            raise UserError(f"{self.checkpoint}/state.json does not hold this step's counts: "
                            f"{str(numbers):.200}{advice}")
        parameters, found = dict(self.model.named_parameters()), []
        files = [os.path.join(self.checkpoint, name) for name in sorted(os.listdir(self.checkpoint))]
        for file in (f for f in files if re.search(r"optimizer[^/]*\.safetensors$", f) and os.path.isfile(f)):
            try:
                with safe_open(file, framework="pt") as f:
                    for entry in f.keys():
                        name, _, key = entry.rpartition(":")
                        p, shape = parameters[name].detach(), list(f.get_slice(entry).get_shape())
                        if shape not in ([], list(p.shape)):
                            raise KeyError(f"{entry} of shape {shape}")
                        value = torch.zeros_like(p) if shape else torch.zeros((), device=p.device)
                        read_part(f, entry, value)
                        self.optimizer.state[parameters[name]][key] = value
                        found.append(entry)
            except (SafetensorError, OSError, KeyError, RuntimeError) as error:
                raise UserError(f"{file} is no optimizer state of this model "
                                f"({str(error):.200}){advice}") from None
        if sorted(found) != expected:
            raise UserError(f"{self.checkpoint}: of the optimizer's {len(expected)} tensors "
                            f"{len(found)} are there{advice}")


# ----------------------------------------------------------------------------------------------- command line

def cli(Config):
    """Command line -> Config. Every field of the dataclass is a flag, its comment is the help text:
    defaults and words stand once. No abbreviations, so a mistyped flag is an error."""
    comments = dict(re.findall(r"^ {4}(\w+):[^#\n]*#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=Config.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
                else dict(type=f.type, metavar=f.type.__name__))
        if f.type is tuple:
            kind = dict(nargs="+", metavar="FILE")
        text = comments.get(f.name, "").replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=f"{text} (default {f.default!r})", **kind)

    def error(message):  # argparse would print the whole usage above it
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = error
    return Config(**vars(parser.parse_args()))


def run(main, Config):
    """Guard of every script: mistakes of the user end in one line and exit code 2,
    bugs keep their traceback."""
    code = 0
    try:
        main(cli(Config))
    except SystemExit as end:
        code = end.code
    except (UserError, torch.OutOfMemoryError) as error:
        code, text = 2, str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = ("out of GPU memory: lower --micro, --ctx or --group, or use more GPUs "
                    f"({text.splitlines()[0]})")
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(2)  # if all ranks have the same to say, rank 0 says it, and torchrun ends the others
        print(f"error: {text}", file=sys.stderr)
    if dist.is_initialized():  # gloo's threads now and then abort an interpreter that ends in order
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)
    sys.exit(code)


AT_LEAST = (dict.fromkeys(("batch", "group", "micro", "max_new", "steps", "updates", "save_every", "runs",
                           "seeds", "test_n", "base_steps", "teacher_steps", "sft_steps", "rl_steps"), 1)
            | dict.fromkeys(("seed", "warmup", "beta", "tis", "weight_decay", "top_k", "eps_low", "eps_high",
                             "temperature"), 0))
ABOVE_0 = "lr", "sft_lr", "rl_lr", "clip"


def check_flags(cfg, **choices):
    """Refuse a number out of the range that its name has everywhere,
    and a flag that is none of its choices."""
    for name, value in dataclasses.asdict(cfg).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag}: must be a finite number")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise UserError(f"{flag}: must be at least {AT_LEAST[name]}")
        if name in ABOVE_0 and value <= 0:
            raise UserError(f"{flag}: must be above 0")
        if name in choices and value not in choices[name]:
            raise UserError(f"{flag}: choose one of {', '.join(choices[name])}")
