"""
The recipe: data, a base model and a teacher, then every arm of the comparison, and one table.

    data ->  base  ->  SFT cold start  ->  GRPO  |  OPD  |  dGRPO        (and dGRPO without the cold start)
             teacher: larger, trained longer -------^-------^

Both stages see a mixture of 10 % short and 90 % long examples by tokens (paper, section 3.3), so that
long-context reasoning rises and the short-context skill stays.

The laptop run trains everything from scratch on tasks made here (`pile`): a document is a shuffled pile of
pairs ("Ada Bob.") and idle sentences, and a question needs several of them:

    hops      follow h links through the pairs                 "Start at Ada and take three steps. Who is it?"
    latest    where a thing is that was moved about, or none   "Where is the coin now?"
    chain     write out the links one after the other          "List the next four after Ada."

Checkpoints of your own learn LongBlocks' five kinds of question on plain sentences in four languages
(`archive`): summary, retrieval, multihop, comprehensive, classification; they are tested on these and on
RULER's synthetic tasks. The sentences are hidden in idle ones, or with --haystack in texts of yours. Three
short tasks without a document (sum, reverse, copy) stand for the skills that must not be forgotten.
--long-data, --short-data and --test-data take examples from files instead.

    python recipe.py                        the laptop: 2 cores, about 7 minutes
    python recipe.py --until sft            only what `python grpo.py` and `python opd.py` start from
    python recipe.py --student DIR --teacher DIR --train-len 8192 --test-len 16384
                                            with checkpoints of your own
"""
import bisect, dataclasses, functools, gc, itertools, json, math, os, shutil, string, sys, time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import regex
import torch
from tqdm import tqdm

import grpo, opd, sft
from model import (PRESETS, QWEN_PATTERN, Log, Tokenizer, UserError, barrier, check_context, check_flags,
                   frozen_dtype, gather, init, load, new_model, rank, read_rows, run, save, tiny_tokenizer,
                   whole, write_file, write_rows, writing)
from model import Config as ModelConfig
from rollout import (PAPER_DECODING, check_rewards, demonstration, evaluate, load_judge, prompt_messages,
                     read_examples, read_text)


@dataclass
class Config:
    """Data, cold start, GRPO, OPD and dGRPO, and a table that compares them."""
    out: str = "out"                # all goes here: data, a directory per stage, results.jsonl, results.md
    student: str = ""               # checkpoint to start from; empty: train a tiny one from scratch
    teacher: str = ""               # the teacher's checkpoint; empty: train a larger tiny one
    until: str = ""                 # stop after this stage: data, base, teacher or sft
    haystack: str = ""              # text files, comma-separated, to hide the facts in; with --student only
    long_data: str = ""             # JSONL files to take long training examples from, instead of making them
    short_data: str = ""            # the same for the short ones
    test_data: str = ""             # JSONL files to test on, instead of the generated tasks
    response_field: str = "response"  # the field of --long-data and --short-data that holds the demonstration
    train_len: int = 256            # prompt tokens of the long training examples
    test_len: int = 512             # a length that no stage trains on, for the table
    long_share: float = 0.9         # share of long examples in the mixture, by tokens
    base_steps: int = 800           # training of the tiny student on short texts
    teacher_steps: int = 600        # training of the tiny teacher, which starts from the base
    sft_steps: int = 30             # cold start
    rl_steps: int = 80              # rollouts of GRPO, OPD and dGRPO
    batch: int = 8                  # prompts per rollout
    group: int = 8                  # completions per prompt
    max_new: int = 128              # tokens of a completion at most
    micro: int = 16384              # tokens of the largest stream
    sft_lr: float = 1e-3            # learning rate of the cold start (paper: 1e-5)
    rl_lr: float = 3e-4             # learning rate of GRPO, OPD and dGRPO (paper: 1e-6)
    beta: float = 0.5               # weight of the KL to the teacher
    test_n: int = 64                # test examples per task and length
    judge: str = ""                 # checkpoint that compares answers with references (paper: Qwen3-4B)
    allow_code: bool = False        # run the programs that completions contain, where examples bring tests
    ablate: bool = False            # the paper's studies instead: 33 arms per seed, in out/seed-N/ (hours)
    seeds: int = 3                  # how many seeds --ablate runs, from --seed on
    seed: int = 0                   # data, weights and sampling
    save_every: int = 20            # steps between checkpoints to go on from
    resume: bool = True             # go on where a run in --out stopped; finished arms are not trained again
    plot: str = ""                  # draw this directory's metrics, results.jsonl, bench.jsonl, and stop


# ------------------------------------------------------------------------------------------------------ tasks

# A family makes a document and questions on it: (rng, budget, kinds, haystack) -> (fill, document, questions)
#   document(n)   the text with n units of filler, the same each time; as many as the budget of tokens allows
#   fill(n)       what n units add, in pieces: counted once, their tokens add up without encoding the document
#   questions     of the given kinds, one each: question, answer, reward, response (a demonstration), language
# haystack: sentences of the user's to hide the facts in, instead of the family's own.

NAMES = ("Ada Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Lee Mia Ned Ola Pam "
         "Quin Ray Sue Tom Una Val Wes Zoe").split()
THINGS = "coin lamp ring book bell drum cup fan".split()
PLACES = "Rome Oslo Lima Cairo Paris Delhi Tokyo Quito Seoul Bern Riga Accra Dakar Hanoi Kyiv Malta".split()
HEADER = "In each pair the first leads to the second:"
NUMBERS = "one two three four five six seven eight".split()
IDLE = ["The sky is clear today.", "Rain fell on the hills.", "The market opens early.",
        "A bell rang in the square.", "The river runs slow.", "Bread is on the table.",
        "The road goes north.", "Lamps were lit at dusk."]
MAX_HOPS = 8          # links of the longest question


def some(rng, words, n):
    return [words[i] for i in rng.permutation(len(words))[:n]]


def any_of(rng, words):
    return words[rng.integers(len(words))]


def scatter(rng, budget, facts, sentences, in_order=False, start="", glue=" "):
    """-> (fill, document): the facts, in their order, at random places among the first n of endlessly many
    sentences. Sentences are drawn at random, or read in order from a random one on (a text of the user's), in
    a circle."""
    drawn = (rng.integers(len(sentences)) + np.arange(budget) if in_order
             else rng.integers(len(sentences), size=budget))
    chosen, keys = [sentences[i] for i in (drawn % len(sentences)).tolist()], rng.random(len(facts) + budget)

    def document(n):
        pieces, ranks = chosen[:n], keys[:len(facts) + n].argsort().argsort()  # permutation: all places alike
        for place, fact in zip(sorted(ranks[:len(facts)].tolist()), facts):
            pieces.insert(place, fact)
        return start + glue.join(pieces)

    return lambda n: chosen[:n], document


# ---- what the tiny models learn: a shuffled pile of pairs

def pile(rng, budget, kinds, _):
    """Links such as "Ada Bob." Names form one cycle, so that everybody leads to one and is led to by one.
    Things lead to a place, and a place to where what was there went next."""
    room = budget - 22  # tokens that header, template and question take, about
    names = some(rng, NAMES, max(4, room // 12))
    links = dict(zip(names, names[1:] + names[:1]))
    places = some(rng, PLACES, len(PLACES))
    for thing in some(rng, THINGS, min(len(THINGS) // 2, max(1, room // 40))):
        stations = [thing] + [places.pop() for _ in range(min(len(places), rng.integers(1, 5)))]
        links |= dict(zip(stations, stations[1:]))
    questions = [PILE[kind](rng, links, int(rng.integers(2, MAX_HOPS + 1))) for kind in kinds]
    facts = some(rng, [f"{a} {b}." for a, b in links.items()], len(links))
    return *scatter(rng, budget, facts, IDLE, start=HEADER + " "), questions


def ask_hops(rng, links, hops):
    """Follow so many links."""
    path = walk(links, any_of(rng, [name for name in NAMES if name in links]), hops)
    question = f"Start at {path[0]} and take {NUMBERS[hops - 1]} steps. Who is it?"
    return task(question, path[-1], "exact", pairs(path))


def ask_latest(rng, links, _):
    """Where a thing is after all that was said of it; one in ten is not mentioned at all."""
    absent = rng.random() < 0.1
    path = walk(links, any_of(rng, [thing for thing in THINGS if (thing in links) != absent]), len(links))
    answer, end = ("none", "absent") if absent else (path[-1], "stays")
    return task(f"Where is the {path[0]} now?", answer, "exact", pairs(path, end))


def ask_chain(rng, links, hops):
    """Write out the path."""
    path = walk(links, any_of(rng, [name for name in NAMES if name in links]), hops)
    return task(f"List the next {NUMBERS[hops - 1]} after {path[0]}.", path[1:], "sequence", pairs(path))


def walk(links, start, steps):
    path = [start]
    while path[-1] in links and len(path) <= steps:
        path.append(links[path[-1]])
    return path


def pairs(path, end=None):
    """Every pair that is used is written out again before the next is looked up: each step is then one
    look-up in the context, which a small model can learn. A bare list of names is not learnt in many times
    the steps."""
    steps = [*zip(path, path[1:])] + ([(path[-1], end)] if end else [])
    return [f"{i + 1} {a} {b}" for i, (a, b) in enumerate(steps)]


def task(question, answer, reward, thoughts, language="en"):
    """A question with its answer, the rule that scores it, and a demonstration that thinks in the given
    lines."""
    gold = answer if isinstance(answer, str) else ", ".join(answer)
    thought = "".join(line + "\n" for line in thoughts)
    return dict(question=question, answer=answer, reward=reward, language=language,
                response=f"<think>\n{thought}</think>\n\nAnswer: {gold}")


PILE = {"hops": ask_hops, "latest": ask_latest, "chain": ask_chain}


# ---- for real models: LongBlocks' five kinds of question on people spread over a text, in four languages

SURNAMES = ("Berg Costa Dahl Engel Ferri Garza Holm Iversen Jansen Keller Lund "
            "Moreno Novak Ortiz Petit Quist").split()
CITIES = "Oslo Lima Berlin Madrid Paris Toronto Dakar Nairobi Quito Boston Chicago Helsinki".split()
LANGUAGES = dict(  # CITIES are spelt alike in all four
    en=dict(lives="{} lives in {}.", works="{} works for {}.", owns="{} owns {} books.",
            idle=["In {} it rained for {} days.", "The museum in {} shows {} paintings.",
                  "In {} there are {} schools."],
            summary="Summarise the document: name everyone of whom it says how many books they own, each "
                    "with the city they live in, as Name: City.",
            retrieval="Where does {} live, for whom does {} work, and how many books does {} own?",
            multihop="Begin with {} and go {} times from a person to the one they work for. Where does "
                     "the last one live?",
            comprehensive="How many books do the people who live in {} own altogether?",
            classification="Which of these cities is home to the most people who own books? {} Answer "
                           "with the letter.",
            end='End with a line that begins with "Answer:"; separate several answers by commas.'),
    de=dict(lives="{} wohnt in {}.", works="{} arbeitet für {}.", owns="{} besitzt {} Bücher.",
            idle=["In {} regnete es {} Tage lang.", "Das Museum in {} zeigt {} Gemälde.",
                  "In {} gibt es {} Schulen."],
            summary="Fasse das Dokument zusammen: Nenne alle Personen, von denen es sagt, wie viele Bücher "
                    "sie besitzen, jeweils mit der Stadt, in der sie wohnen, als Name: Stadt.",
            retrieval="Wo wohnt {}, für wen arbeitet {}, und wie viele Bücher besitzt {}?",
            multihop="Beginne bei {} und gehe {}-mal von einer Person zu der, für die sie arbeitet. Wo "
                     "wohnt die letzte?",
            comprehensive="Wie viele Bücher besitzen die Personen, die in {} wohnen, insgesamt?",
            classification="In welcher dieser Städte wohnen die meisten Personen, die Bücher besitzen? {} "
                           "Antworte mit dem Buchstaben.",
            end='Schließe mit einer Zeile, die mit "Answer:" beginnt; trenne mehrere Antworten '
                'durch Kommas.'),
    fr=dict(lives="{} habite à {}.", works="{} travaille pour {}.", owns="{} possède {} livres.",
            idle=["À {}, il a plu pendant {} jours.", "À {}, le musée expose {} tableaux.",
                  "À {}, il y a {} écoles."],
            summary="Résume le document : cite toutes les personnes dont il dit combien de livres elles "
                    "possèdent, chacune avec la ville où elle habite, sous la forme Nom: Ville.",
            retrieval="Où habite {}, pour qui travaille {} et combien de livres possède {} ?",
            multihop="Commence par {} et passe {} fois d'une personne à celle pour qui elle travaille. Où "
                     "habite la dernière ?",
            comprehensive="Combien de livres possèdent au total les personnes qui habitent à {} ?",
            classification="Laquelle de ces villes compte le plus d'habitants qui possèdent des livres ? {} "
                           "Réponds par la lettre.",
            end='Termine par une ligne qui commence par "Answer:" ; sépare plusieurs réponses '
                'par des virgules.'),
    es=dict(lives="{} vive en {}.", works="{} trabaja para {}.", owns="{} tiene {} libros.",
            idle=["En {} llovió durante {} días.", "El museo de {} expone {} cuadros.",
                  "En {} hay {} escuelas."],
            summary="Resume el documento: nombra a todas las personas de las que dice cuántos libros "
                    "tienen, cada una con la ciudad donde vive, en la forma Nombre: Ciudad.",
            retrieval="¿Dónde vive {}, para quién trabaja {} y cuántos libros tiene {}?",
            multihop="Empieza por {} y pasa {} veces de una persona a aquella para la que trabaja. ¿Dónde "
                     "vive la última?",
            comprehensive="¿Cuántos libros tienen en total las personas que viven en {}?",
            classification="¿En cuál de estas ciudades viven más personas que tienen libros? {} Responde "
                           "con la letra.",
            end='Termina con una línea que empiece por "Answer:"; separa varias respuestas con comas.'))


def archive(rng, budget, kinds, haystack):
    """People, each with a city, someone they work for and a number of books, told in one language and asked
    in another."""
    told, language = (any_of(rng, [*LANGUAGES]) for _ in range(2))
    n = min(24, max(3, budget // 96))
    people = [f"{name} {any_of(rng, SURNAMES)}" for name in some(rng, NAMES, n)]
    cities, homes, tally = some(rng, CITIES, 4), [], [0, 0]
    while tally[-1] == tally[-2]:  # until one city has the most people
        homes = rng.integers(4, size=n).tolist()
        tally = sorted(np.bincount(homes, minlength=4).tolist())
    w = SimpleNamespace(people=people, cities=cities,
                        lives={p: cities[home] for p, home in zip(people, homes)},
                        works=dict(zip(people, people[1:] + people[:1])),
                        owns={p: int(rng.integers(2, 100)) for p in people})
    # the sentences about each person, as the document has them: demonstrations quote what they use
    w.said = {fact: {p: LANGUAGES[told][fact].format(p, getattr(w, fact)[p]) for p in people}
              for fact in ("lives", "works", "owns")}
    questions = []
    for kind in kinds:
        blanks, answer, reward, thoughts = ARCHIVE[kind](rng, w)
        question = LANGUAGES[language][kind].format(*blanks) + " " + LANGUAGES[language]["end"]
        questions.append(task(question, answer, reward, thoughts, language))
    facts = some(rng, [sentence for about in w.said.values() for sentence in about.values()], 3 * n)
    idle = [s.format(c, i) for s in LANGUAGES[told]["idle"] for c in CITIES for i in range(2, 30)]  # plurals
    return *scatter(rng, budget, facts, haystack or idle, in_order=bool(haystack)), questions


def ask_summary(rng, w):
    """All people of the document, with one thing about each."""
    return [], [f"{p}: {w.lives[p]}" for p in w.people], "set", w.said["lives"].values()


def ask_retrieval(rng, w):
    """Three parts, answered by three places of the document."""
    a, b, c = (any_of(rng, w.people) for _ in range(3))
    thoughts = [w.said["lives"][a], w.said["works"][b], w.said["owns"][c]]
    return [a, b, c], [w.lives[a], w.works[b], str(w.owns[c])], "sequence", thoughts


def ask_multihop(rng, w):
    """Each look-up names the person for the next."""
    path = walk(w.works, any_of(rng, w.people), int(rng.integers(2, min(6, len(w.people)))))
    thoughts = [w.said["works"][p] for p in path[:-1]] + [w.said["lives"][path[-1]]]
    return [path[0], len(path) - 1], w.lives[path[-1]], "exact", thoughts


def ask_comprehensive(rng, w):
    """Two things about everyone: where they live, and a number to add up."""
    city = w.lives[any_of(rng, w.people)]
    there = [p for p in w.people if w.lives[p] == city]
    total = sum(w.owns[p] for p in there)
    thoughts = [w.said[fact][p] for p in there for fact in ("lives", "owns")]
    return [city], str(total), "exact", thoughts + [" + ".join(str(w.owns[p]) for p in there) + f" = {total}"]


def ask_classification(rng, w):
    """Which of four labels fits the document as a whole: the city where most of its people live."""
    there = {city: [p for p in w.people if w.lives[p] == city] for city in w.cities}
    options = [f"{letter}) {city}" for letter, city in zip("ABCD", w.cities)]
    best = "ABCD"[np.argmax([len(there[city]) for city in w.cities])]
    thoughts = [f"{option}: {len(there[city])} {there[city]}" for option, city in zip(options, w.cities)]
    return [" ".join(options) + "."], best, "choice", thoughts


ARCHIVE = {"summary": ask_summary, "retrieval": ask_retrieval, "multihop": ask_multihop,
           "comprehensive": ask_comprehensive, "classification": ask_classification}


# ---- tests for real models, in the words of RULER (arXiv 2404.06654), whose texts need no download. Left out
#      are RULER's worked example before vt and cwe, and the beginning of the answer that it hands the model.

ADJECTIVES = ("bold brave bright calm cold crisp dark eager fast fresh gentle happy huge "
              "keen loud proud quick warm").split()
NOUNS = ("anchor apple arrow basket bridge candle castle clock cloud eagle engine forest "
         "garden hammer island lemon").split()
KEYS = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
WORDS = [f"{key}-{b}" for key in KEYS for b in [*NOUNS, *THINGS]]  # enough for 128K tokens
NOISE = ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."]
NEEDLES = dict(niah_single=(1, 1, 1), niah_multikey=(4, 1, 1), niah_multivalue=(1, 4, 1),
               niah_multiquery=(4, 1, 4))


def niah(rng, budget, kinds, haystack):
    """Needles in a haystack: so many keys in the text, values of each, and keys asked for."""
    n, values, asked = NEEDLES[kinds[0]]
    keys, numbers = some(rng, KEYS, n), rng.integers(10**6, 10**7, size=(n, values)).tolist()
    needles = [f"One of the special magic numbers for {k} is: {v}."
               for k, row in zip(keys, numbers) for v in row]
    start = ("Some special magic numbers are hidden within the following text. Make sure to memorize it. "
             "I will quiz you about the numbers afterwards.\n")
    question = "What are all the special magic numbers for {} mentioned in the provided text?"
    if values * asked == 1:
        start = start.replace("Some", "A").replace("are", "is").replace("numbers", "number")
        question = question.replace("are all", "is").replace("numbers", "number")
    query = ", ".join(keys[:asked - 1] + [("and " if asked > 1 else "") + keys[asked - 1]])
    answers = [str(v) for row in numbers[:asked] for v in row]
    found = task(question.format(query), answers, "recall", needles[:len(answers)])
    text = scatter(rng, budget, some(rng, needles, len(needles)), haystack or NOISE,
                   bool(haystack), start, "\n")
    return *text, [found]


def variable_tracking(rng, budget, _, haystack):
    """Five variables, of which each after the first is assigned the one before."""
    names = ["".join(row) for row in rng.choice([*string.ascii_uppercase], size=(5, 5))]
    value = str(rng.integers(10000, 99999))
    lines = [f"VAR {a} = {b}" for a, b in zip(names, [value] + [f"VAR {name}" for name in names])]
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    start = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    text = scatter(rng, budget, lines, haystack or NOISE, bool(haystack), start, "\n")
    return *text, [task(question, names, "recall", lines)]


def common_words(rng, budget, *_):
    """A numbered list in which ten words come often; what fills up are words that come rarely."""
    if budget > 2**17:
        raise UserError(f"cwe has words for prompts of {2**17} tokens, found {budget}: lower --test-len")
    often, rarely = (30, 3) if budget >= 4096 else (6, 1)
    words, keys = some(rng, WORDS, len(WORDS)), rng.random(budget)
    common, others = words[:10], words[10:]

    start = ("Below is a numbered list of words. In these words, some appear more often than others. "
             "Memorize the ones that appear most often.\n")

    def document(n):
        listed = mixed(common * often + others[:n] * rarely, keys)
        return start + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    def fill(n):
        return others[:n] * rarely + [f"{i}." for i in range(10 * often + 1, 10 * often + n * rarely + 1)]
    question = "Question: What are the 10 most common words in the above list?"
    return fill, document, [task(question, common, "recall", [f"{word}: {often}" for word in common])]


def frequent_words(rng, budget, *_):
    """Coded words, the k-th of which makes up 1 / (k^2 zeta(2)) of the text; the first is noise."""
    coded = ["..."] + ["".join(row)
                       for row in rng.choice([*string.ascii_lowercase], size=(max(4, budget // 50), 6))]
    share, keys = 6 / np.pi**2 / np.arange(1, len(coded) + 1) ** 2, rng.random(budget)

    def fill(n):  # from 80 words on, no two of the first five come equally often
        return [word for word, times in zip(coded, ((80 + n) * share).astype(int).tolist())
                for _ in range(times)]

    start = ("Read the following coded text and track the frequency of each coded word. Find the "
             "three most frequently appeared coded words. ")
    question = ("Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
                "most frequently appeared words in the above coded text?")
    return fill, lambda n: start + " ".join(mixed(fill(n), keys)), [task(question, coded[1:4], "recall", [])]


def mixed(words, keys):
    return [words[i] for i in keys[:len(words)].argsort().tolist()]


RULER = {**dict.fromkeys(NEEDLES, niah), "vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
FAMILIES = {**dict.fromkeys(PILE, pile), **dict.fromkeys(ARCHIVE, archive), **RULER}


# ---- short tasks, without a document

def ask_sum(rng, test):
    """Add three digits from left to right. There are only 729 such questions: one in eight of them is kept
    for the test."""
    held_out = not test
    while held_out != test:
        a, b, c = (int(x) for x in rng.integers(1, 10, 3))
        held_out = (a + 2 * b + 4 * c) % 8 == 0
    thoughts = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"]
    return task(f"What is {a} + {b} + {c}?", str(a + b + c), "exact", thoughts)


def ask_reverse(rng, _):
    """A list, last one first."""
    names = some(rng, NAMES, rng.integers(3, 6))
    return task(f"Turn this list around: {', '.join(names)}.", names[::-1], "sequence",
                [f"{i + 1} {name}" for i, name in enumerate(names)])


def ask_copy(rng, _):
    """A list of words, once more: the plainest use of a context, and what the look-ups of the long tasks grow
    from."""
    text = " ".join(some(rng, [*NAMES, *THINGS, *PLACES], rng.integers(5, 21)))
    return task(f"Write this again: {text}", text, "exact", [])


SHORT = {"sum": ask_sum, "reverse": ask_reverse, "copy": ask_copy}


# ---- examples

SPLITS = dict(base=0, sft=1, rl=2, test=3, teacher=5)  # every split draws documents of its own


def long_examples(seed, split, n, length, questions, kinds, tokenizer, haystack=()):
    """n documents, each as the list of its examples: some questions on it, of the kinds in turn. The longest
    prompt of a document takes `length` tokens, or so many that one more unit of filler would exceed them.
    Document i depends on (seed, split, length, i) alone, so any order of access gives the same data."""
    @functools.lru_cache(2**18)
    def count(piece):  # pieces are joined by white space, which tokens hardly ever cross: lengths add up
        return len(tokenizer.encode(" " + piece))

    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS[split], length, i])
        asked = [kinds[(i + j) % len(kinds)] for j in range(questions)]
        fill, document, tasks = FAMILIES[asked[0]](rng, length, asked, haystack)
        longest = max(tasks, key=lambda t: len(tokenizer.encode(t["question"])))

        @functools.cache
        def size(n):
            return len(tokenizer.chat(prompt_messages(longest | dict(document=document(n)))))

        @functools.cache
        def estimate(n):
            return sum(map(count, fill(n)))
        if size(0) > length:
            raise UserError(f"a prompt of {asked[0]} takes at least {size(0)} tokens, so there is none of "
                            f"{length}: raise --train-len")
        text = document(most(size, estimate, length))
        yield [dict(id=f"{split}-{length}-{i}-{j}", document=text, source="generated", kind=kind, **t)
               for j, (kind, t) in enumerate(zip(asked, tasks))]


def most(size, estimate, limit):
    """The largest n with size(n) <= limit. size is slow; differences of estimate(n) tell where to look."""
    n = 0
    for _ in range(3):
        n = max(bisect.bisect_right(range(limit), limit - size(n) + estimate(n), key=estimate) - 1, 0)
    while size(n) > limit:
        n -= 1
    while size(n + 1) <= limit:
        n += 1
    return n


def short_examples(seed, split, n, end=""):
    """n short examples, each a list of one; end is put after every question."""
    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS[split], 0, i])
        kind = list(SHORT)[i % len(SHORT)]
        example = dict(id=f"{split}-short-{i}", source="generated", kind=kind,
                       **SHORT[kind](rng, split == "test"))
        yield [example | dict(question=example["question"] + end)]


def mixture(short, long, long_share, size):
    """Interleave two streams of lists of examples so that the long ones hold `long_share` of the tokens, as
    closely as whole lists allow at every point. Ends when the stream that is wanted next has run out."""
    tokens, streams = {True: 0, False: 0}, {True: iter(long), False: iter(short)}
    while True:
        take_long = (tokens[True] <= long_share * sum(tokens.values()) if 0 < long_share < 1
                     else long_share == 1)
        examples = next(streams[take_long], None)
        if examples is None:
            return
        tokens[take_long] += size(examples)
        yield examples


# ------------------------------------------------------------------------------------------------------- data

BASE_LENS = 54, 84  # prompt tokens of documents in the base model's training: the short world it comes from


def task_words():
    """The words of the tiny models' tasks, read off a sample of them: what the tiny tokenizer keeps whole."""
    rng, texts = np.random.default_rng(0), ["user\n", "assistant\n"]
    for _ in range(200):
        _, document, tasks = pile(rng, 232, [*PILE] * 2, ())
        tasks = [t | dict(document=document(20)) for t in tasks] + [ask(rng, False) for ask in SHORT.values()]
        texts += [text for t in tasks for text in (prompt_messages(t)[0]["content"], t["response"])]
    return sorted({piece for text in texts for piece in regex.findall(QWEN_PATTERN, text) if len(piece) > 1})


def paths_of(cfg, flag):
    """The files that a flag names, separated by commas; UserError if one is not there."""
    paths = [path.strip() for path in getattr(cfg, flag).split(",") if path.strip()]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"--{flag.replace('_', '-')}: there is no file {path}")
    return paths


def read_haystack(cfg):
    """The sentences of the user's texts, in order; white space within them becomes single spaces."""
    text = " ".join(" ".join(read_text(path) for path in paths_of(cfg, "haystack")).split())
    sentences = [s.strip() for s in regex.split(r"(?<=[.!?…]['\"”’»)]?) |(?<=[。！？])", text)
                 if s.strip()]
    if cfg.haystack and not sentences:
        raise UserError(f"--haystack {cfg.haystack}: there is no text in it")
    return sentences


def write_data(cfg, tokenizer, tiny=False):
    """The JSONL files of every stage. Returns their paths by name.

    Tiny models learn the pile and are tested on it. Checkpoints of the user's learn the archive, and are
    tested on it and on RULER. Where the user gives files, nothing is made: their examples are read by place,
    in random order."""
    kinds, end = (list(ARCHIVE), " " + LANGUAGES["en"]["end"]) if cfg.student else (list(PILE), "")
    haystack, skipped = read_haystack(cfg), {}

    def size(examples):  # tokens of a document count once, as they are computed once
        asked = examples[:1] + [e | dict(document="") for e in examples[1:]]
        return sum(len(tokenizer.chat(prompt_messages(e)))
                   + len(tokenizer.completion(demonstration(e, "response") or "")) for e in asked)

    def given(flag, split):
        field = cfg.response_field if split == "sft" else None
        examples = torch.utils.data.ConcatDataset(
            [read_examples(path, field) for path in paths_of(cfg, flag)])
        for i in np.random.default_rng([cfg.seed, SPLITS[split]]).permutation(len(examples)).tolist():
            example = examples[i]
            if field:
                example = example | dict(response=demonstration(example, field))
            prompt = len(tokenizer.chat(prompt_messages(example)))
            if prompt > cfg.train_len or size([example]) > cfg.test_len + cfg.max_new:
                skipped.setdefault((flag, split), set()).add(i)  # several mixtures may read the same file
            else:
                yield [example]

    def documents(split, n, length, questions, kinds=kinds):
        return long_examples(cfg.seed, split, n, length, questions, kinds, tokenizer, haystack)

    def mix(split, n, lengths, questions, long_share):
        """Short examples and at most n documents, of the lengths in turn, by shares of tokens."""
        rounds = zip(*(documents(split, n // len(lengths), length, questions) for length in lengths))
        long = (itertools.islice(given("long_data", split), n) if cfg.long_data
                else (d for r in rounds for d in r))
        short = given("short_data", split) if cfg.short_data else short_examples(cfg.seed, split, 10**6, end)
        return mixture(short if long_share else itertools.islice(short, n), long, long_share, size)

    def test():
        if cfg.test_data:
            yield from ([e] for path in paths_of(cfg, "test_data") for e in read_examples(path))
            return
        yield from short_examples(cfg.seed, "test", cfg.test_n * len(SHORT), end)
        for length in sorted({cfg.train_len // 2, cfg.train_len, cfg.test_len}):
            yield from documents("test", cfg.test_n, length, len(kinds))
            if cfg.student:
                yield from documents("test", cfg.test_n * len(RULER), length, 1, list(RULER))

    lengths = cfg.train_len // 2, cfg.train_len
    splits = dict(test=test())
    for name, share in [("", cfg.long_share)] + [(f"-{share}", share / 100) for share in SHARES] * cfg.ablate:
        splits["sft" + name] = mix("sft", max(500, cfg.sft_steps * sft.Config.batch), lengths, 8, share)
        splits["rl" + name] = mix("rl", max(500, cfg.rl_steps * cfg.batch), lengths, 1, share)
    if tiny:  # what the tiny base and teacher learn from
        splits |= dict(base=mix("base", 5000, BASE_LENS, 8, 0.7),
                       teacher=mix("teacher", 1500, lengths, 8, 0.6))
    paths = {name: os.path.join(cfg.out, "data", f"{name}.jsonl") for name in splits}
    for name, lists in splits.items() if rank() == 0 else []:
        if cfg.resume and os.path.exists(paths[name]):  # whole, and of the same configuration
            continue
        os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
        with writing(paths[name]), open(paths[name] + ".writing", "w", encoding="utf-8",
                                        errors="replace") as f:  # surrogates become "?"
            for examples in tqdm(lists, desc=f"{'data':8} {paths[name]}", unit=" documents"):
                f.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        if not os.path.getsize(paths[name] + ".writing"):
            raise UserError(f"{paths[name]} would be empty: no example fits into --train-len {cfg.train_len}")
        os.replace(paths[name] + ".writing", paths[name])
    for (flag, split), n in skipped.items():
        print(f"{split}: {len(n)} examples of --{flag.replace('_', '-')} are left out: prompts longer than "
              "--train-len, or with their demonstration than --test-len + --max-new", file=sys.stderr)
    barrier()
    return paths


# ------------------------------------------------------------------------------------------------------- arms

# An arm is (start, stage, options): the arm it goes on from, the method training it (None: nothing does), and
# its settings; options["data"] is a file of write_data, options["teacher"] an arm, or a word grpo.py knows.

SHARES = 0, 10, 25, 50, 75, 100     # % of long tokens, besides the recipe's own --long-share
BETAS = 0.1, 0.25, 1.0, 2.0, 4.0    # besides --beta, and 0, which is GRPO; without bound it is OPD


def settings(cfg):
    """Options of the cold start, of what learns from a teacher alone, from reward alone, and from both."""
    cold = dict(data="sft", steps=cfg.sft_steps, lr=cfg.sft_lr)
    rl = dict(data="rl", steps=cfg.rl_steps, lr=cfg.rl_lr, batch=cfg.batch, group=cfg.group,
              max_new=cfg.max_new)
    scored = rl | dict(judge=cfg.judge, allow_code=cfg.allow_code)
    return cold, rl | dict(teacher="teacher"), scored, scored | dict(teacher="teacher", beta=cfg.beta)


def recipe_arms(cfg):
    """The recipe, and what it is compared with; every arm has the same rollouts and steps."""
    cold, taught, scored, both = settings(cfg)
    return {"teacher": ("teacher", None, {}), "base": ("base", None, {}), "SFT": ("base", sft, cold),
            "SFT+GRPO": ("SFT", grpo, scored), "SFT+OPD": ("SFT", opd, taught),
            "SFT+dGRPO": ("SFT", grpo, both), "dGRPO without SFT": ("base", grpo, both)}


def ablation_arms(cfg):
    """recipe_arms and, as variations of SFT+dGRPO, the arms of the paper's other studies."""
    cold, _, scored, both = settings(cfg)
    twice = dict(updates=2)  # with one update per rollout the KL to the policy that sampled is exactly 0
    kd = dict(cold, teacher="teacher", lam=0.0, kl="forward", max_new=cfg.max_new,
              batch=8 * sft.Config.batch)  # the questions on as many documents as a batch of SFT has
    arms = recipe_arms(cfg) | {f"beta {beta:g}": ("SFT", grpo, both | dict(beta=beta)) for beta in BETAS}
    arms |= {"KL to its start": ("SFT", grpo, both | dict(teacher="ref")),
             "KL to the base": ("SFT", grpo, both | dict(teacher="base")),
             "KL to itself, 2 updates": ("SFT", grpo, both | twice | dict(teacher="self")),
             "SFT+GRPO, 2 updates": ("SFT", grpo, scored | twice)}
    for share in SHARES:
        arms |= {f"SFT, {share} % long": ("base", sft, cold | dict(data=f"sft-{share}")),
                 f"{share} % long": (f"SFT, {share} % long", grpo, both | dict(data=f"rl-{share}"))}
    return arms | {"KD": ("base", opd, kd), "KD+dGRPO": ("KD", grpo, both),
                   "KL on the first 30 %": ("SFT", grpo, both | dict(kl_first=0.3)),
                   "KL of the sampled token": ("SFT", grpo, both | dict(kl="k2")),
                   "beta falling to 0": ("SFT", grpo, both | dict(beta_schedule="linear"))}


STUDIES = {"Method": ["teacher", "base", "SFT", "SFT+GRPO", "SFT+OPD", "SFT+dGRPO", "dGRPO without SFT"],
           "Weight of the KL": ["SFT+GRPO", *(f"beta {beta:g}" for beta in BETAS[:2]), "SFT+dGRPO",
                                *(f"beta {beta:g}" for beta in BETAS[2:]), "SFT+OPD"],
           "Teacher": ["SFT+dGRPO", "KL to its start", "KL to the base", "KL to itself, 2 updates",
                       "SFT+GRPO, 2 updates", "SFT+GRPO"],
           "Share of long tokens": [*(f"{share} % long" for share in SHARES[:-1]), "SFT+dGRPO",
                                    f"{SHARES[-1]} % long"],
           "Cold start": ["SFT", "KD", "dGRPO without SFT", "SFT+dGRPO", "KD+dGRPO"],
           "Form of the KL": ["SFT+dGRPO", "KL on the first 30 %", "KL of the sampled token",
                              "beta falling to 0"]}


# ------------------------------------------------------------------------------------------------------ table

def summary(rows, long_from):
    """Long and short score: means over their cells (task and length), with the standard error that follows
    from theirs. Cells of long_from tokens or more are long; a score without cells is missing (None)."""
    scores = {}
    for name in ("long", "short"):
        cells = [r for r in rows if (r["length"] >= long_from) == (name == "long")]
        scores[name] = float(np.mean([r["mean"] for r in cells])) if cells else None
        scores[name + "_stderr"] = (math.sqrt(sum(r["stderr"] ** 2 for r in cells)) / len(cells)
                                    if cells else None)
    return scores


def over_seeds(values):
    """Mean and standard error of the numbers of several seeds; None for the error of a single one."""
    values = np.asarray(values, dtype=float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None


def percent(values, sign=""):
    if not values:
        return ""
    mean, error = over_seeds(values)
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def ends(rows):
    """arm -> seed -> row of its end."""
    found = {}
    for row in rows:
        if row["step"] == row["steps"]:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def studies(rows):
    """The rows of --ablate as Markdown, a table for each study: means over the seeds with their standard
    errors, and differences to SFT+dGRPO, seed by seed."""
    final, parts = ends(rows), []
    for title, arms in STUDIES.items():
        lines = [f"| {title} | long | short | long, against SFT+dGRPO | short | seeds |",
                 "|---|---|---|---|---|---|"]
        for name in arms:
            pairs = [(final[name][seed], final["SFT+dGRPO"][seed])
                     for seed in final[name].keys() & final["SFT+dGRPO"].keys()]
            scores, gains = [], []
            for score in ("long", "short"):
                told = [(a[score], b[score]) for a, b in pairs if a[score] is not None]
                scores.append(percent([a for a, _ in told]))
                gains.append(percent([a - b for a, b in told], "+") if name != "SFT+dGRPO" else "")
            lines.append(f"| {name} | {' | '.join(scores + gains)} | {len(pairs)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def table(results):
    """results.jsonl's rows as a Markdown table; scores in percent with standard errors."""
    cells = [(r["family"], r["length"]) for r in results[0]["scores"]]
    lines = ["| arm | long | short | " + " | ".join(f"{family} {length}" for family, length in cells) + " |",
             "|---" * (len(cells) + 3) + "|"]
    for r in results:
        scores = ["" if r[name] is None else f"{100 * r[name]:.1f} ± {100 * r[name + '_stderr']:.1f}"
                  for name in ("long", "short")]
        found = {(c["family"], c["length"]): f"{100 * c['mean']:.0f} ± {100 * c['stderr']:.0f}"
                 for c in r["scores"]}
        scores += [found.get(cell, "") for cell in cells]
        lines.append(f"| {r['arm']} | " + " | ".join(scores) + " |")
    return "\n".join(lines)


PANELS = ["reward", "loss", "kl", "entropy", "length", "truncated", "zero_variance", "clipped", "logp_diff",
          "grad_norm", "lr", "memory_gb"]


def plot(path):
    """Draw what there is in a directory: the metrics of its runs, results.jsonl of --ablate, bench.jsonl of
    rollout.py."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    drawn, results = 0, seeded(path)
    for name, rows, draw in [("metrics", runs_below(path), draw_metrics),
                             ("steps", results, draw_steps), ("studies", results, draw_studies),
                             ("bench", trained(os.path.join(path, "bench.jsonl")), draw_bench)]:
        if rows:
            file = os.path.join(path, f"{name}.png")
            draw(plt, rows).savefig(file, dpi=110)
            plt.close("all")
            print(f"drew {file}")
            drawn += 1
    if not drawn:
        raise UserError(f"--plot {path}: in it is no run with steps, no results.jsonl of --ablate, and no "
                        "bench.jsonl with training rows of `rollout.py --bench`")


def runs_below(path):
    """Name -> rows of the metrics.jsonl of a run that is `path`, or stands in it."""
    folders = ([path, *(entry.path for entry in os.scandir(path) if entry.is_dir())]
               if os.path.isdir(path) else [])
    runs = {os.path.relpath(folder, path): read_rows(os.path.join(folder, "metrics.jsonl"))[1:]
            for folder in sorted(folders)}
    return {name: rows for name, rows in runs.items() if rows and "step" in rows[0]}


def seeded(path):
    """The rows of results.jsonl, if it is one of --ablate."""
    file = os.path.join(path, "results.jsonl")
    rows = read_rows(file)
    missing = ({"arm", "start", "seed", "step", "steps", "long", "short", "scores"}
               - (rows[0].keys() if rows else set()))
    if rows and missing:
        raise UserError(f"{file} was written by another version: its rows lack {', '.join(sorted(missing))}")
    final = ends(rows).keys()
    if final <= {*STUDIES["Method"]}:  # of the plain recipe: the table says it all
        return []
    if lacking := {*itertools.chain(*STUDIES.values())} - final:
        raise UserError(f"{file} lacks {', '.join(sorted(lacking))}: run recipe.py --ablate to its end")
    if None in (rows[0]["long"], rows[0]["short"]):
        raise UserError(f"{file} has no long or no short scores: the figures need both")
    return rows


def trained(file):
    rows = [row for row in read_rows(file) if row.get("task") == "train" and row["who"] == "ours"]
    return sorted(rows, key=lambda row: row["P"])


def draw_metrics(plt, runs):
    """A panel for each quantity, a line for each run."""
    panels = [name for name in PANELS if any(name in rows[0] for rows in runs.values())]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(13, 3 * -(-len(panels) // 3)),
                                squeeze=False)
    styles = [dict(color=c, linestyle=s)
              for s in ("-", "--", ":") for c in ("0", "0.45", "tab:blue", "tab:orange")]
    for axis, panel in zip(axes.flat, panels):
        for (name, rows), style in zip(runs.items(), styles * len(runs)):
            rows = [row for row in rows if panel in row]
            axis.plot([row["step"] for row in rows], [row[panel] for row in rows],
                      label=name, linewidth=1, **style)
        axis.set(title=panel, xlabel="step")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", ncols=3)
    figure.tight_layout()
    return figure


STYLES = {"SFT+GRPO": dict(color="0.55", linestyle=":", marker="s"),
          "SFT+OPD": dict(color="tab:orange", linestyle="--", marker="^"),
          "SFT+dGRPO": dict(color="0", linestyle="-", marker="o"),
          "SFT": dict(color="tab:blue", linestyle="-.", marker="v"),
          "dGRPO without SFT": dict(color="tab:green", linestyle=(0, (5, 1, 1, 1, 1, 1)), marker="D"),
          "base": dict(color="0.75", linestyle="-", marker="x"),
          "teacher": dict(color="tab:red", linestyle="--", marker="*")}


def line_over_seeds(axis, x, values, label, **style):
    """A line through means over the seeds, values[seed][x], in a band of a standard error to both sides."""
    means, errors = zip(*(over_seeds(column) for column in zip(*values)))
    axis.plot(x, means, label=label, markersize=4, **style)
    low, high = zip(*((m - (e or 0), m + (e or 0)) for m, e in zip(means, errors)))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_steps(plt, rows):
    """Scores and reward of the methods over the steps."""
    final, curves = ends(rows), {}
    for row in rows:
        curves.setdefault((row["arm"], row["seed"]), {})[row["step"]] = row
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for arm in ["SFT+GRPO", "SFT+OPD", "SFT+dGRPO", "dGRPO without SFT"]:
        ended = final[arm]
        steps = sorted(set.intersection(*({*curves[arm, seed]} for seed in ended)))
        for axis, name in zip(axes, ("long", "short")):
            values = [[100 * row[name]
                       for row in [final[end["start"]][seed], *(curves[arm, seed][s] for s in steps)]]
                      for seed, end in ended.items()]
            line_over_seeds(axis, [0, *steps], values, arm, **STYLES[arm])
            axis.set(title=f"{name} score", xlabel="step", ylabel="mean score, %")
        if all(len(end["rewards"]) >= 5 for end in ended.values()):
            means = [np.convolve(end["rewards"], np.full(5, 0.2), "valid")  # of 5 steps each
                     for end in ended.values()]
            line_over_seeds(axes[2], range(2, 2 + len(means[0])), means, arm, **STYLES[arm] | dict(marker=""))
    axes[2].set(title="reward while training, mean of 5 steps", xlabel="step", ylabel="mean reward")
    axes[0].legend()
    figure.tight_layout()
    return figure


def draw_studies(plt, rows):
    """The short/long frontier; the weight of the KL; the mixture;
    scores against the length of the context."""
    final, longs = ends(rows), sorted({c["length"] for c in rows[0]["scores"] if c["family"] not in SHORT})
    figure, ((frontier, beta), (mix, length)) = plt.subplots(2, 2, figsize=(11, 9))

    def scores(arm, name):
        return [100 * row[name] for _, row in sorted(final[arm].items())]

    for arm, style in STYLES.items():
        (x, dx), (y, dy) = (over_seeds(scores(arm, name)) for name in ("short", "long"))
        frontier.errorbar(x, y, dy, dx, label=arm, capsize=2, **style | dict(linestyle="none"))
        by_length = [[100 * np.mean([c["mean"] for c in row["scores"] if c["length"] == n]) for n in longs]
                     for row in final[arm].values()]
        line_over_seeds(length, longs, by_length, arm, **style)
    frontier.set(title="methods", xlabel="short score, %", ylabel="long score, %")
    frontier.legend(fontsize=8)

    weights = ["0", *(f"{b:g}" for b in BETAS[:2]), Config.beta, *(f"{b:g}" for b in BETAS[2:]), "OPD"]
    shares = [*SHARES[:-1], 100 * Config.long_share, SHARES[-1]]
    for axis, x, study in [(beta, range(len(weights)), "Weight of the KL"),
                           (mix, shares, "Share of long tokens")]:
        for name, style in [("long", STYLES["SFT+dGRPO"]), ("short", STYLES["SFT+GRPO"])]:
            line_over_seeds(axis, x, [*zip(*(scores(arm, name) for arm in STUDIES[study]))], name, **style)
        axis.legend()
    beta.set(title="weight of the KL to the teacher", xlabel="beta", ylabel="mean score, %",
             xticks=range(len(weights)), xticklabels=weights)
    mix.set(title="mixture of SFT and dGRPO", xlabel="long tokens, %", ylabel="mean score, %")
    if len(longs) == 3:  # as write_data makes them: two of the training, and one that nobody trains on
        length.axvline(longs[1], color="0.8", linewidth=8, zorder=0)
        length.annotate("longest in training", (longs[1], 2), rotation=90, ha="center", fontsize=7)
    length.set(title="score against the length of the context", xlabel="prompt, tokens",
               ylabel="mean score of the long tasks, %", xscale="log", xticks=longs, xticklabels=longs)
    length.minorticks_off()
    figure.tight_layout()
    return figure


def draw_bench(plt, rows):
    """Time and memory of a training step over the prompt's length, beside what the formulas say."""
    x, last = [row["P"] / 1024 for row in rows], rows[-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    times = [row["flops"] * last["seconds"] / last["flops"] for row in rows]
    for axis, title, found, formula, label in [
            (axes[0], "time of a training step, s", [row["seconds"] for row in rows], times,
             "FLOPs, scaled to the last point"),
            (axes[1], "peak memory beyond the weights, MB", [row["peak_bytes"] / 1e6 for row in rows],
             [row["planned_bytes"] / 1e6 for row in rows], "formula of the planner")]:
        axis.loglog(x, found, "o-", color="0", label="measured")
        axis.loglog(x, formula, "s--", color="0.5", label=label, markerfacecolor="none")
        axis.set(title=title, xlabel="prompt, thousands of tokens", xticks=x,
                 xticklabels=[f"{v:.0f}" for v in x])
        ticks = [y for e in range(-2, 5) for y in (10**e, 2 * 10**e, 5 * 10**e)
                 if min(found) / 2 < y < 2 * max(found)]
        axis.set(yticks=ticks, yticklabels=[f"{y:g}" for y in ticks])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------------------- main

def deepen(path, out, seed):
    """Make the tiny teacher out of the base model: one more layer, which at first adds nothing to the
    residual stream. It knows at once what the base knows, which spares its own, longer, training on short
    texts."""
    base, tokenizer = load(path)
    shape = dict(vocab_size=base.config.vocab_size,
                 max_position_embeddings=base.config.max_position_embeddings)
    teacher = new_model(ModelConfig(**shape, **PRESETS["tiny-teacher"]), seed)
    teacher.load_state_dict(base.state_dict(), strict=False)
    for layer in teacher.layers[len(base.layers):]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    save(out, teacher, tokenizer)


def check(cfg):
    """Refuse what cannot work: now, not after the cold start."""
    if cfg.until not in ("", "data", "base", "teacher", "sft"):
        raise UserError(f"--until {cfg.until}: choose one of data, base, teacher, sft, or leave it out "
                        "for the whole recipe")
    if cfg.train_len < 128 or cfg.test_len < cfg.train_len:
        raise UserError(f"--train-len {cfg.train_len} must be at least 128, "
                        f"--test-len {cfg.test_len} not below it")
    columns = [(length - 1).bit_length() for length in (cfg.train_len, cfg.test_len)]  # evaluate()'s columns
    if not cfg.test_data and cfg.test_len > cfg.train_len and columns[0] == columns[1]:
        raise UserError(f"--train-len {cfg.train_len} and --test-len {cfg.test_len} would share a column "
                        "of the table: put a power of two between them")
    if bool(cfg.student) != bool(cfg.teacher):
        raise UserError("give both --student and --teacher, or neither: the tiny ones share a tokenizer of "
                        "their own")
    rl = dict(batch=cfg.batch, group=cfg.group, max_new=cfg.max_new, micro=cfg.micro)
    grpo.check(grpo.Config(**rl, beta=cfg.beta))
    opd.check(opd.Config(**rl))
    check_flags(cfg)
    if cfg.train_len + cfg.max_new > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: a prompt with one completion can take "
                        f"{cfg.train_len + cfg.max_new} tokens")
    if not 0 <= cfg.long_share <= 1:
        raise UserError(f"--long-share {cfg.long_share}: a share lies between 0 and 1")
    for flag in ("haystack", "long_data", "short_data", "test_data"):
        paths_of(cfg, flag)
    if cfg.haystack and not cfg.student:
        raise UserError("--haystack hides the facts of the tasks for checkpoints of your own: give --student "
                        "and --teacher too")
    read_haystack(cfg)
    if cfg.student:
        if not Tokenizer.from_dir(cfg.student).same_encoding(Tokenizer.from_dir(cfg.teacher)):
            raise UserError(f"the teacher {cfg.teacher} encodes text otherwise than the student "
                            f"{cfg.student}: choose one of the same family")
        check_context(cfg.test_len + cfg.max_new,
                      *(ModelConfig.from_dir(path) for path in (cfg.student, cfg.teacher)))
    if cfg.ablate and (cfg.beta, cfg.long_share) != (Config.beta, Config.long_share):
        raise UserError(f"--ablate varies --beta and --long-share itself, around {Config.beta} and "
                        f"{Config.long_share}: leave them out")
    if cfg.ablate and cfg.until:
        raise UserError(f"--until {cfg.until} stops the recipe, not --ablate: leave one of them out")
    if cfg.ablate and os.path.exists(os.path.join(cfg.out, "metrics.jsonl")):
        raise UserError(f"{cfg.out} holds a run without --ablate: choose another --out")
    if cfg.judge:
        ModelConfig.from_dir(cfg.judge), Tokenizer.from_dir(cfg.judge).chat([dict(role="user", content="")])


def train(cfg, out, arm, places, data, watch=None):
    """Train an arm, or what of it is still to be done -> its checkpoint. places: name -> checkpoint it may go
    on from, or learn from. watch(step, model, tokenizer): see model.Run."""
    start, stage, options = arm
    options = options | dict(data=data[options["data"]])
    if "teacher" in options:
        options["teacher"] = places.get(options["teacher"], options["teacher"])
    stage.main(stage.Config(model=places[start], out=out, seed=cfg.seed, ctx=cfg.test_len + cfg.max_new,
                            micro=cfg.micro, save_every=cfg.save_every, resume=cfg.resume, **options), watch)
    gc.collect()  # FSDP2's modules are cycles: without this they outlive their stage
    return out


def run_arms(cfg, arms, places, data, test, device):
    """Train and test every arm -> rows of results.jsonl: one for its end and, with --ablate, for every
    --save-every steps before.
    Rows are kept in out/scores/: of a run that stopped, they are not made again."""
    places, found = dict(places), []
    sampling = PAPER_DECODING if cfg.student else {}

    def score(model, tokenizer, progress):
        # the judge comes anew for every test: between them training needs its memory
        judge = load_judge(cfg.judge, device) if cfg.judge else None
        with whole(model) as sampler:
            cells = evaluate(sampler, tokenizer, test, cfg.test_len + cfg.max_new, cfg.max_new, seed=cfg.seed,
                             progress=f"{'test':8} {progress}", judge=judge, allow_code=cfg.allow_code,
                             **sampling)
        return dict(**summary(cells, cfg.train_len // 2), n=sum(cell["n"] for cell in cells), scores=cells)

    def run_arm(name, arm):
        """Put the arm's checkpoint into places, and return its rows."""
        start, stage, options = arm
        folder, steps = os.path.join(cfg.out, slug(name)), options.get("steps", 0)
        file = os.path.join(cfg.out, "scores", f"{slug(name)}.jsonl")
        rows = {row["step"]: row for row in gather(read_rows(file) if rank() == 0 else None)[0]}

        def note(step, model, tokenizer, **more):
            if step in rows:
                return
            scores = score(model, tokenizer, f"{name}, step {step}")
            rows[step] = dict(arm=name, start=start, seed=cfg.seed, step=step, steps=steps, **scores, **more)
            if rank() == 0:
                os.makedirs(os.path.dirname(file), exist_ok=True)
                write_rows(file, [rows[s] for s in sorted(rows)])

        places[name] = folder if stage else places[start]
        if steps not in rows:
            began = time.time()
            if stage:
                train(cfg, folder, arm, places, data, note if cfg.ablate else None)
            seconds = time.time() - began  # less than the arm took where it went on from a checkpoint
            rewards = [row["reward"] for row in read_rows(os.path.join(folder, "metrics.jsonl"))[1:]
                       if "reward" in row]
            note(steps, *load(places[name], frozen_dtype(device), device), seconds=seconds, rewards=rewards)
        return [rows[step] for step in sorted(rows)]

    for name, arm in arms.items():
        found += run_arm(name, arm)
    return found


def slug(name):
    return regex.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def run_recipe(cfg, arms, device, given=None):
    """Everything, from the data to the rows of the table, in cfg.out -> places of base and teacher, and rows
    (None if --until stops it). given: those places, if both are made already."""
    log = Log(cfg, "recipe")
    log.begin(keep=lambda row: False)
    at = functools.partial(os.path.join, cfg.out)
    if not cfg.resume and rank() == 0:  # or this run, if killed, would resume with stages of the one before
        for name in ["base", "teacher", "scores", *map(slug, arms)]:
            shutil.rmtree(at(name), ignore_errors=True)

    # data, and the models the paper takes as given: a base good at short texts, and a better, larger teacher
    places = dict(given or dict(base=cfg.student, teacher=cfg.teacher))
    tokenizer = Tokenizer.from_dir(cfg.student) if cfg.student else tiny_tokenizer(task_words())
    if not places["base"]:
        places["init"] = at("init")
        shape = ModelConfig(vocab_size=-(-tokenizer.n_vocab // 64) * 64,
                            max_position_embeddings=max(4096, cfg.test_len + cfg.max_new),
                            **PRESETS["tiny-student"])
        save(at("init"), new_model(shape, cfg.seed), tokenizer)
    data = write_data(cfg, tokenizer, tiny=not places["base"])
    test = read_examples(data["test"])
    for examples in (test, read_examples(data["rl"])):
        check_rewards(examples, cfg.judge, cfg.allow_code)
    if cfg.until != "data" and not places["base"]:
        options = dict(data="base", steps=cfg.base_steps, lr=3e-3, schedule="cosine", warmup=20, batch=32)
        places["base"] = train(cfg, at("base"), ("init", sft, options), places, data)
    if cfg.until not in ("data", "base") and not places["teacher"]:
        places["init-teacher"] = at("init-teacher")
        deepen(places["base"], places["init-teacher"], cfg.seed)
        options = dict(data="teacher", steps=cfg.teacher_steps, lr=2e-3, schedule="cosine")
        places["teacher"] = train(cfg, at("teacher"), ("init-teacher", sft, options), places, data)
    if cfg.until == "sft":
        train(cfg, at("sft"), arms["SFT"], places, data)
    rows = None if cfg.until else run_arms(cfg, arms, places, data, test, device)
    log.close()
    return {name: places[name] for name in ("base", "teacher")}, rows


def given_models(cfg, device):
    """Base and teacher of --ablate, alike for all seeds: the user's, or tiny ones made once, in out/given."""
    if cfg.student:
        return dict(base=cfg.student, teacher=cfg.teacher)
    cfg = dataclasses.replace(cfg, out=os.path.join(cfg.out, "given"), seed=0, ablate=False, until="teacher")
    places = {name: os.path.join(cfg.out, name) for name in ("base", "teacher")}
    Log(cfg, "recipe")  # refuses those of other flags
    made = all(os.path.exists(os.path.join(path, "config.json")) for path in places.values())
    return places if made and cfg.resume else run_recipe(cfg, recipe_arms(cfg), device)[0]


def main(cfg):
    if cfg.plot:
        return plot(cfg.plot)
    check(cfg)
    device, began, at = init(), time.time(), functools.partial(os.path.join, cfg.out)
    if cfg.ablate:
        seeds = range(cfg.seed, cfg.seed + cfg.seeds)
        others = [int(name[5:]) for name in os.listdir(cfg.out) if regex.fullmatch(r"seed-\d+", name)
                  ] if os.path.isdir(cfg.out) else []
        of_seed = {seed: dataclasses.replace(cfg, out=at(f"seed-{seed}"), seed=seed)
                   for seed in {*seeds, *others}}
        for each in of_seed.values():  # what other processes made counts too, if its flags are ours
            Log(each, "recipe")
        given = given_models(cfg, device)
        for seed in seeds:
            _, rows = run_recipe(of_seed[seed], ablation_arms(cfg), device, given)
            if rank() == 0:
                write_rows(at(f"seed-{seed}", "results.jsonl"), rows)
        rows = [row for seed in sorted(of_seed) for row in read_rows(at(f"seed-{seed}", "results.jsonl"))]
    else:
        _, rows = run_recipe(cfg, recipe_arms(cfg), device)
    if rank() > 0:
        return
    if cfg.until:
        return print(f"stopped after {cfg.until}, as --until says")
    write_rows(at("results.jsonl"), rows)
    text = studies(rows) if cfg.ablate else table(rows)
    write_file(at("results.md"), f"{text}\n".encode())
    about = "" if cfg.test_data else f"; {cfg.test_n} test examples per task and length"
    if not cfg.test_data and cfg.test_len > cfg.train_len:
        about += f", {cfg.test_len} tokens is a length no stage has seen"
    minutes = (time.time() - began) / 60
    print(f"\nMean score in %, ± standard error{about}.\n\n{text}\n\n"
          f"This took {minutes:.1f} minutes; see {cfg.out}/.")


if __name__ == "__main__":
    run(main, Config)
