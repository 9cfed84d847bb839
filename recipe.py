"""
The recipe: data, a base model and a teacher, then every arm of the comparison, and one table.

    data ->  base  ->  SFT cold start  ->  GRPO  |  OPD  |  dGRPO        (and dGRPO without the cold start)
             teacher: larger, trained longer -------^-------^

Both stages see a mixture of 10 % short and 90 % long examples by tokens (paper, section 3.3), so that long-context
reasoning rises and the short-context skill stays.

The laptop run trains everything from scratch on tasks made here (`pile`): a document is a shuffled pile of pairs ("Ada
Bob.") and idle sentences, and a question needs several of them:

    hops      follow h links through the pairs                     "Start at Ada and take three steps. Who is it?"
    latest    where a thing is that was moved about, or none       "Where is the coin now?"
    chain     write out the links one after the other              "List the next four after Ada."

Checkpoints of your own learn LongBlocks' five kinds of question on plain sentences in four languages (`archive`): summary,
retrieval, multihop, comprehensive, classification; they are tested on these and on RULER's synthetic tasks. The sentences
are hidden in idle ones, or with --haystack in texts of yours. Three short tasks without a document (sum, reverse, copy)
stand for the skills that must not be forgotten. --long-data, --short-data and --test-data take examples from files instead.

    python recipe.py                                               the laptop: 2 cores, about 9 minutes
    python recipe.py --until sft                                   only what `python grpo.py` and `python opd.py` start from
    python recipe.py --student DIR --teacher DIR --train-len 8192 --test-len 16384      with checkpoints of your own
"""
import bisect, functools, gc, itertools, json, math, os, shutil, string, sys, time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import regex
import torch
from tqdm import tqdm

import grpo, opd, sft
from model import (PRESETS, QWEN_PATTERN, Log, Tokenizer, UserError, barrier, check_context, check_flags, gather, init, load,
                   new_model, rank, read_rows, run, save, tiny_tokenizer, write_file)
from model import Config as ModelConfig
from rollout import (PAPER_DECODING, check_rewards, demonstration, evaluate, load_judge, prompt_messages, read_examples,
                     read_text)


@dataclass
class Config:
    """Data, cold start, GRPO, OPD and dGRPO, and a table that compares them."""
    out: str = "out"                # everything goes here: data, a directory per stage, results.jsonl, results.md
    student: str = ""               # checkpoint to start from; empty: train a tiny one from scratch
    teacher: str = ""               # the teacher's checkpoint; empty: train a larger tiny one
    until: str = ""                 # stop after this stage: data, base, teacher or sft
    haystack: str = ""              # text files, separated by commas, to hide the facts in; with --student only
    long_data: str = ""             # JSONL files to take the long training examples from, instead of making them
    short_data: str = ""            # the same for the short ones
    test_data: str = ""             # JSONL files to test on, instead of the generated tasks
    response_field: str = "response"  # the field of --long-data and --short-data that holds the demonstration
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
    judge: str = ""                 # checkpoint that compares answers with references (paper: Qwen3-4B)
    allow_code: bool = False        # run the programs that completions contain, where examples bring tests
    seed: int = 0                   # data, weights and sampling
    save_every: int = 20            # steps between checkpoints to go on from
    resume: bool = True             # go on where a run in --out stopped; arms that are done are not trained again
    plot: str = ""                  # draw the metrics below this directory, or the lines of rollout.py --bench, and stop


# --------------------------------------------------------------------------------------------------------------------- tasks

# A family makes a document and questions on it: family(rng, budget, kinds, haystack) -> (fill, document, questions).
#   document(n)   the text with n units of filler, the same each time; as many units as the budget of tokens allows are taken
#   fill(n)       what n units add, in pieces: their tokens can be counted once and added up, without encoding the document
#   questions     of the given kinds, one each: question, answer, reward, response (a demonstration), language
# haystack: sentences of the user's to hide the facts in, instead of the family's own.

NAMES = "Ada Bob Cid Dan Eve Fay Gil Hal Ida Jon Kim Lee Mia Ned Ola Pam Quin Ray Sue Tom Una Val Wes Zoe".split()
THINGS = "coin lamp ring book bell drum cup fan".split()
PLACES = "Rome Oslo Lima Cairo Paris Delhi Tokyo Quito Seoul Bern Riga Accra Dakar Hanoi Kyiv Malta".split()
HEADER = "In each pair the first leads to the second:"
NUMBERS = "one two three four five six seven eight".split()
IDLE = ["The sky is clear today.", "Rain fell on the hills.", "The market opens early.", "A bell rang in the square.",
        "The river runs slow.", "Bread is on the table.", "The road goes north.", "Lamps were lit at dusk."]
MAX_HOPS = 8          # links of the longest question


def some(rng, words, n):
    return [words[i] for i in rng.permutation(len(words))[:n]]


def any_of(rng, words):
    return words[rng.integers(len(words))]


def scatter(rng, budget, facts, sentences, in_order=False, start="", glue=" "):
    """-> (fill, document): the facts, in their order, at random places among the first n of endlessly many sentences.

    Sentences are drawn at random, or read in order from a random one on (a text of the user's), in a circle."""
    drawn = rng.integers(len(sentences)) + np.arange(budget) if in_order else rng.integers(len(sentences), size=budget)
    chosen, keys = [sentences[i] for i in (drawn % len(sentences)).tolist()], rng.random(len(facts) + budget)

    def document(n):
        pieces, ranks = chosen[:n], keys[:len(facts) + n].argsort().argsort()  # a permutation: all places are alike
        for place, fact in zip(sorted(ranks[:len(facts)].tolist()), facts):
            pieces.insert(place, fact)
        return start + glue.join(pieces)

    return lambda n: chosen[:n], document


# ---- what the tiny models learn: a shuffled pile of pairs

def pile(rng, budget, kinds, _):
    """Links such as "Ada Bob." Names form one cycle, so that everybody leads to one and is led to by one. Things lead to a
    place, and a place to where what was there went next."""
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
    """Every pair that is used is written out again before the next is looked up: each step is then one look-up in the
    context, which a small model can learn. A bare list of names is not learnt in many times the steps."""
    steps = [*zip(path, path[1:])] + ([(path[-1], end)] if end else [])
    return [f"{i + 1} {a} {b}" for i, (a, b) in enumerate(steps)]


def task(question, answer, reward, thoughts, language="en"):
    """A question with its answer, the rule that scores it, and a demonstration that thinks in the given lines."""
    gold = answer if isinstance(answer, str) else ", ".join(answer)
    thought = "".join(line + "\n" for line in thoughts)
    return dict(question=question, answer=answer, reward=reward, language=language,
                response=f"<think>\n{thought}</think>\n\nAnswer: {gold}")


PILE = {"hops": ask_hops, "latest": ask_latest, "chain": ask_chain}


# ---- for real models: LongBlocks' five kinds of question on people spread over a text, in four languages

SURNAMES = "Berg Costa Dahl Engel Ferri Garza Holm Iversen Jansen Keller Lund Moreno Novak Ortiz Petit Quist".split()
CITIES = "Oslo Lima Berlin Madrid Paris Toronto Dakar Nairobi Quito Boston Chicago Helsinki".split()  # alike in all four
LANGUAGES = dict(
    en=dict(lives="{} lives in {}.", works="{} works for {}.", owns="{} owns {} books.", idle=[
                "In {} it rained for {} days.", "The museum in {} shows {} paintings.", "In {} there are {} schools."],
            summary="Summarise the document: name everyone of whom it says how many books they own, each with the city "
                    "they live in, as Name: City.",
            retrieval="Where does {} live, for whom does {} work, and how many books does {} own?",
            multihop="Begin with {} and go {} times from a person to the one they work for. Where does the last one live?",
            comprehensive="How many books do the people who live in {} own altogether?",
            classification="Which of these cities is home to the most people who own books? {} Answer with the letter.",
            end='End with a line that begins with "Answer:"; separate several answers by commas.'),
    de=dict(lives="{} wohnt in {}.", works="{} arbeitet für {}.", owns="{} besitzt {} Bücher.", idle=[
                "In {} regnete es {} Tage lang.", "Das Museum in {} zeigt {} Gemälde.", "In {} gibt es {} Schulen."],
            summary="Fasse das Dokument zusammen: Nenne alle Personen, von denen es sagt, wie viele Bücher sie besitzen, "
                    "jeweils mit der Stadt, in der sie wohnen, als Name: Stadt.",
            retrieval="Wo wohnt {}, für wen arbeitet {}, und wie viele Bücher besitzt {}?",
            multihop="Beginne bei {} und gehe {}-mal von einer Person zu der, für die sie arbeitet. Wo wohnt die letzte?",
            comprehensive="Wie viele Bücher besitzen die Personen, die in {} wohnen, insgesamt?",
            classification="In welcher dieser Städte wohnen die meisten Personen, die Bücher besitzen? {} Antworte mit "
                           "dem Buchstaben.",
            end='Schließe mit einer Zeile, die mit "Answer:" beginnt; trenne mehrere Antworten durch Kommas.'),
    fr=dict(lives="{} habite à {}.", works="{} travaille pour {}.", owns="{} possède {} livres.", idle=[
                "À {}, il a plu pendant {} jours.", "À {}, le musée expose {} tableaux.", "À {}, il y a {} écoles."],
            summary="Résume le document : cite toutes les personnes dont il dit combien de livres elles possèdent, "
                    "chacune avec la ville où elle habite, sous la forme Nom: Ville.",
            retrieval="Où habite {}, pour qui travaille {} et combien de livres possède {} ?",
            multihop="Commence par {} et passe {} fois d'une personne à celle pour qui elle travaille. Où habite la "
                     "dernière ?",
            comprehensive="Combien de livres possèdent au total les personnes qui habitent à {} ?",
            classification="Laquelle de ces villes compte le plus d'habitants qui possèdent des livres ? {} Réponds par "
                           "la lettre.",
            end='Termine par une ligne qui commence par "Answer:" ; sépare plusieurs réponses par des virgules.'),
    es=dict(lives="{} vive en {}.", works="{} trabaja para {}.", owns="{} tiene {} libros.", idle=[
                "En {} llovió durante {} días.", "El museo de {} expone {} cuadros.", "En {} hay {} escuelas."],
            summary="Resume el documento: nombra a todas las personas de las que dice cuántos libros tienen, cada una "
                    "con la ciudad donde vive, en la forma Nombre: Ciudad.",
            retrieval="¿Dónde vive {}, para quién trabaja {} y cuántos libros tiene {}?",
            multihop="Empieza por {} y pasa {} veces de una persona a aquella para la que trabaja. ¿Dónde vive la última?",
            comprehensive="¿Cuántos libros tienen en total las personas que viven en {}?",
            classification="¿En cuál de estas ciudades viven más personas que tienen libros? {} Responde con la letra.",
            end='Termina con una línea que empiece por "Answer:"; separa varias respuestas con comas.'))


def archive(rng, budget, kinds, haystack):
    """People, each with a city, someone they work for and a number of books, told in one language and asked in another."""
    told, language = (any_of(rng, [*LANGUAGES]) for _ in range(2))
    n = min(24, max(3, budget // 96))
    people = [f"{name} {any_of(rng, SURNAMES)}" for name in some(rng, NAMES, n)]
    cities, homes, tally = some(rng, CITIES, 4), [], [0, 0]
    while tally[-1] == tally[-2]:  # until one city has the most people
        homes = rng.integers(4, size=n).tolist()
        tally = sorted(np.bincount(homes, minlength=4).tolist())
    w = SimpleNamespace(people=people, cities=cities, lives={p: cities[home] for p, home in zip(people, homes)},
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
    idle = [s.format(c, i) for s in LANGUAGES[told]["idle"] for c in CITIES for i in range(2, 30)]  # from 2: plurals
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


# ---- tests for real models, in the words of RULER (arXiv 2404.06654), whose texts need no download. The worked example
#      that RULER puts before vt and cwe is left out, and so is the beginning of the answer that it hands the model.

ADJECTIVES = "bold brave bright calm cold crisp dark eager fast fresh gentle happy huge keen loud proud quick warm".split()
NOUNS = "anchor apple arrow basket bridge candle castle clock cloud eagle engine forest garden hammer island lemon".split()
KEYS = [f"{a}-{b}" for a in ADJECTIVES for b in NOUNS]
WORDS = [f"{key}-{b}" for key in KEYS for b in [*NOUNS, *THINGS]]  # enough for 128K tokens
NOISE = ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."]
NEEDLES = dict(niah_single=(1, 1, 1), niah_multikey=(4, 1, 1), niah_multivalue=(1, 4, 1), niah_multiquery=(4, 1, 4))


def niah(rng, budget, kinds, haystack):
    """Needles in a haystack: so many keys in the text, values of each, and keys asked for."""
    n, values, asked = NEEDLES[kinds[0]]
    keys, numbers = some(rng, KEYS, n), rng.integers(10**6, 10**7, size=(n, values)).tolist()
    needles = [f"One of the special magic numbers for {k} is: {v}." for k, row in zip(keys, numbers) for v in row]
    start = ("Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
             "about the numbers afterwards.\n")
    question = "What are all the special magic numbers for {} mentioned in the provided text?"
    if values * asked == 1:
        start = start.replace("Some", "A").replace("are", "is").replace("numbers", "number")
        question = question.replace("are all", "is").replace("numbers", "number")
    query = ", ".join(keys[:asked - 1] + [("and " if asked > 1 else "") + keys[asked - 1]])
    answers = [str(v) for row in numbers[:asked] for v in row]
    found = task(question.format(query), answers, "recall", needles[:len(answers)])
    text = scatter(rng, budget, some(rng, needles, len(needles)), haystack or NOISE, bool(haystack), start, "\n")
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

    start = ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
             "appear most often.\n")

    def document(n):
        listed = mixed(common * often + others[:n] * rarely, keys)
        return start + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    def fill(n):
        return others[:n] * rarely + [f"{i}." for i in range(10 * often + 1, 10 * often + n * rarely + 1)]
    question = "Question: What are the 10 most common words in the above list?"
    return fill, document, [task(question, common, "recall", [f"{word}: {often}" for word in common])]


def frequent_words(rng, budget, *_):
    """Coded words, the k-th of which makes up 1 / (k^2 zeta(2)) of the text; the first is noise."""
    coded = ["..."] + ["".join(row) for row in rng.choice([*string.ascii_lowercase], size=(max(4, budget // 50), 6))]
    share, keys = 6 / np.pi**2 / np.arange(1, len(coded) + 1) ** 2, rng.random(budget)

    def fill(n):  # from 80 words on, no two of the first five come equally often
        return [word for word, times in zip(coded, ((80 + n) * share).astype(int).tolist()) for _ in range(times)]

    start = ("Read the following coded text and track the frequency of each coded word. Find the three most frequently "
             "appeared coded words. ")
    question = ("Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                "frequently appeared words in the above coded text?")
    return fill, lambda n: start + " ".join(mixed(fill(n), keys)), [task(question, coded[1:4], "recall", [])]


def mixed(words, keys):
    return [words[i] for i in keys[:len(words)].argsort().tolist()]


RULER = {**dict.fromkeys(NEEDLES, niah), "vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}
FAMILIES = {**dict.fromkeys(PILE, pile), **dict.fromkeys(ARCHIVE, archive), **RULER}


# ---- short tasks, without a document

def ask_sum(rng, test):
    """Add three digits from left to right. There are only 729 such questions: one in eight of them is kept for the test."""
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
    """A list of words, once more: the plainest use of a context, and what the look-ups of the long tasks grow from."""
    text = " ".join(some(rng, [*NAMES, *THINGS, *PLACES], rng.integers(5, 21)))
    return task(f"Write this again: {text}", text, "exact", [])


SHORT = {"sum": ask_sum, "reverse": ask_reverse, "copy": ask_copy}


# ---- examples

SPLITS = ["base", "sft", "rl", "test", "words"]  # every split draws documents of its own


def long_examples(seed, split, n, length, questions, kinds, tokenizer, haystack=()):
    """n documents, each as the list of its examples: some questions on it, of the kinds in turn. The longest prompt of a
    document takes `length` tokens, or so many that one more unit of filler would exceed them. Document i depends on (seed,
    split, length, i) alone, so any order of access gives the same data."""
    @functools.lru_cache(2**18)
    def count(piece):  # documents are pieces joined by white space, and tokens hardly ever reach across: lengths add up
        return len(tokenizer.encode(" " + piece))

    for i in range(n):
        rng = np.random.default_rng([seed, SPLITS.index(split), length, i])
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
            raise UserError(f"a prompt of {asked[0]} takes at least {size(0)} tokens, so there is none of {length}: raise "
                            "--train-len")
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
        rng = np.random.default_rng([seed, SPLITS.index(split), 0, i])
        kind = list(SHORT)[i % len(SHORT)]
        example = dict(id=f"{split}-short-{i}", source="generated", kind=kind, **SHORT[kind](rng, split == "test"))
        yield [example | dict(question=example["question"] + end)]


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

BASE_LENS = 54, 84    # prompt tokens of the documents in the base model's training: the short world it comes from


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
    sentences = [s.strip() for s in regex.split(r"(?<=[.!?…]['\"”’»)]?) |(?<=[。！？])", text) if s.strip()]
    if cfg.haystack and not sentences:
        raise UserError(f"--haystack {cfg.haystack}: there is no text in it")
    return sentences


def write_data(cfg, tokenizer):
    """The JSONL files of every stage. Returns their paths by name.

    Tiny models learn the pile and are tested on it. Checkpoints of the user's learn the archive, and are tested on it and
    on RULER. Where the user gives files, nothing is made: their examples are read by place, in random order."""
    kinds, end = (list(ARCHIVE), " " + LANGUAGES["en"]["end"]) if cfg.student else (list(PILE), "")
    haystack, skipped = read_haystack(cfg), Counter()

    def size(examples):  # tokens of a document count once, as they are computed once
        asked = examples[:1] + [e | dict(document="") for e in examples[1:]]
        return sum(len(tokenizer.chat(prompt_messages(e))) + len(tokenizer.completion(demonstration(e, "response") or ""))
                   for e in asked)

    def given(flag, split):
        field = cfg.response_field if split == "sft" else None
        examples = torch.utils.data.ConcatDataset([read_examples(path, field) for path in paths_of(cfg, flag)])
        for i in np.random.default_rng([cfg.seed, SPLITS.index(split)]).permutation(len(examples)).tolist():
            example = examples[i]
            if field:
                example = example | dict(response=demonstration(example, field))
            prompt = len(tokenizer.chat(prompt_messages(example)))
            if prompt > cfg.train_len or size([example]) > cfg.test_len + cfg.max_new:
                skipped[flag, split] += 1
            else:
                yield [example]

    def documents(split, n, length, questions, kinds=kinds):
        return long_examples(cfg.seed, split, n, length, questions, kinds, tokenizer, haystack)

    def mix(split, n, lengths, questions, long_share):
        """Short examples and at most n documents, of the lengths in turn, by shares of tokens."""
        rounds = zip(*(documents(split, n // len(lengths), length, questions) for length in lengths))
        long = itertools.islice(given("long_data", split), n) if cfg.long_data else (d for r in rounds for d in r)
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
    splits = dict(sft=mix("sft", max(1500, cfg.sft_steps * sft.Config.batch), lengths, 8, cfg.long_share),
                  rl=mix("rl", max(1000, cfg.rl_steps * cfg.batch), lengths, 1, cfg.long_share), test=test())
    if not cfg.student:
        splits["base"] = mix("base", 5000, BASE_LENS, 8, 0.7)
    paths = {name: os.path.join(cfg.out, "data", f"{name}.jsonl") for name in splits}
    for name, lists in splits.items() if rank() == 0 else []:
        if cfg.resume and os.path.exists(paths[name]):  # whole, and of the same configuration
            continue
        os.makedirs(os.path.dirname(paths[name]), exist_ok=True)
        with open(paths[name] + ".writing", "w", encoding="utf-8", errors="replace") as f:  # a lone surrogate becomes "?"
            for examples in tqdm(lists, desc=f"{'data':8} {paths[name]}", unit=" documents"):
                f.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        if not os.path.getsize(paths[name] + ".writing"):
            raise UserError(f"{paths[name]} would be empty: no example fits into --train-len {cfg.train_len}")
        os.replace(paths[name] + ".writing", paths[name])
    for (flag, split), n in skipped.items():
        print(f"{split}: {n} examples of --{flag.replace('_', '-')} are left out: longer than --train-len, or with their "
              "demonstration than --test-len + --max-new", file=sys.stderr)
    barrier()
    return paths


# --------------------------------------------------------------------------------------------------------------------- table

def summary(rows, long_from):
    """Long and short score: means over their cells (task and length), with the standard error that follows from theirs.
    Cells of long_from tokens or more are long; a score without cells is missing (None)."""
    scores = {}
    for name in ("long", "short"):
        cells = [r for r in rows if (r["length"] >= long_from) == (name == "long")]
        scores[name] = float(np.mean([r["mean"] for r in cells])) if cells else None
        scores[name + "_stderr"] = math.sqrt(sum(r["stderr"] ** 2 for r in cells)) / len(cells) if cells else None
    return scores


def table(results):
    """results.jsonl's rows as a Markdown table; scores in percent with standard errors."""
    cells = [(r["family"], r["length"]) for r in results[0]["scores"]]
    lines = ["| arm | long | short | " + " | ".join(f"{family} {length}" for family, length in cells) + " |",
             "|---" * (len(cells) + 3) + "|"]
    for r in results:
        scores = ["" if r[name] is None else f"{100 * r[name]:.1f} ± {100 * r[name + '_stderr']:.1f}"
                  for name in ("long", "short")]
        found = {(c["family"], c["length"]): f"{100 * c['mean']:.0f} ± {100 * c['stderr']:.0f}" for c in r["scores"]}
        scores += [found.get(cell, "") for cell in cells]
        lines.append(f"| {r['arm']} | " + " | ".join(scores) + " |")
    return "\n".join(lines)


PANELS = ["reward", "loss", "kl", "entropy", "length", "truncated", "zero_variance", "clipped", "logp_diff", "grad_norm", "lr",
          "memory_gb"]


def plot(path):
    """Draw a directory's metrics (metrics.png in it), or the lines of `rollout.py --bench` (a .png beside the file)."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure, path = plot_bench(plt, path) if path.endswith(".jsonl") else plot_metrics(plt, path)
    figure.savefig(path, dpi=110)
    print(f"drew {path}")


def plot_bench(plt, path):
    """Time and memory of a training step over the prompt's length, beside what the formulas say."""
    rows = [row for row in read_rows(path) if row.get("task") == "train" and row["who"] == "ours"]
    if not rows:
        raise UserError(f"--plot {path}: no training rows of `rollout.py --bench` in it")
    rows.sort(key=lambda row: row["P"])
    x, last = [row["P"] / 1024 for row in rows], rows[-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    times = [row["flops"] * last["seconds"] / last["flops"] for row in rows]
    for axis, title, found, formula, label in [
            (axes[0], "time of a training step, s", [row["seconds"] for row in rows], times, "FLOPs, scaled to the last point"),
            (axes[1], "peak memory beyond the weights, MB", [row["peak_bytes"] / 1e6 for row in rows],
             [row["planned_bytes"] / 1e6 for row in rows], "formula of the planner")]:
        axis.loglog(x, found, "o-", color="0", label="measured", base=2)
        axis.loglog(x, formula, "s--", color="0.5", label=label, base=2, markerfacecolor="none")
        axis.set(title=title, xlabel="prompt, thousands of tokens", xticks=x, xticklabels=[f"{v:.0f}" for v in x])
        axis.legend()
    figure.tight_layout()
    return figure, path.removesuffix(".jsonl") + ".png"


def plot_metrics(plt, out):
    """A panel for each quantity, a line for each metrics.jsonl below `out`."""
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
    return figure, os.path.join(out, "metrics.png")


# ---------------------------------------------------------------------------------------------------------------------- main

def deepen(path, out, seed):
    """Make the tiny teacher out of the base model: one more layer, which at first adds nothing to the residual stream. It
    knows at once what the base knows, which spares its own, longer, training on short texts."""
    base, tokenizer = load(path)
    shape = dict(vocab_size=base.config.vocab_size, max_position_embeddings=base.config.max_position_embeddings)
    teacher = new_model(ModelConfig(**shape, **PRESETS["tiny-teacher"]), seed)
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
    if cfg.train_len < 128 or cfg.test_len < cfg.train_len:
        raise UserError(f"--train-len {cfg.train_len} must be at least 128, --test-len {cfg.test_len} not below it")
    columns = [(length - 1).bit_length() for length in (cfg.train_len, cfg.test_len)]  # evaluate() sorts by powers of two
    if not cfg.test_data and cfg.test_len > cfg.train_len and columns[0] == columns[1]:
        raise UserError(f"--train-len {cfg.train_len} and --test-len {cfg.test_len} would share a column of the table: "
                        "put a power of two between them")
    if bool(cfg.student) != bool(cfg.teacher):
        raise UserError("give both --student and --teacher, or neither: the tiny ones share a tokenizer of their own")
    # mistakes show now, not after the cold start
    rl = dict(batch=cfg.batch, group=cfg.group, max_new=cfg.max_new, micro=cfg.micro)
    grpo.check(grpo.Config(**rl, beta=cfg.beta))
    opd.check(opd.Config(**rl))
    check_flags(cfg)
    if cfg.train_len + cfg.max_new > cfg.micro:
        raise UserError(f"--micro {cfg.micro}: a prompt with one completion can take {cfg.train_len + cfg.max_new} tokens")
    if not 0 <= cfg.long_share <= 1:
        raise UserError(f"--long-share {cfg.long_share}: a share lies between 0 and 1")
    for flag in ("haystack", "long_data", "short_data", "test_data"):
        paths_of(cfg, flag)
    if cfg.haystack and not cfg.student:
        raise UserError("--haystack hides the facts of the tasks for checkpoints of your own: give --student and --teacher too")
    read_haystack(cfg)
    ctx = cfg.test_len + cfg.max_new
    if cfg.student:
        tokenizer = Tokenizer.from_dir(cfg.student)
        if not tokenizer.same_encoding(Tokenizer.from_dir(cfg.teacher)):
            raise UserError(f"the teacher {cfg.teacher} encodes text otherwise than the student {cfg.student}: choose "
                            "one of the same family")
        check_context(ctx, *(ModelConfig.from_dir(path) for path in (cfg.student, cfg.teacher)))
    if cfg.judge:  # found now, not after the cold start
        ModelConfig.from_dir(cfg.judge), Tokenizer.from_dir(cfg.judge).chat([dict(role="user", content="")])
    device, began = init(), time.time()
    log = Log(cfg, "recipe")
    log.begin(keep=lambda row: cfg.resume)  # of a run that stopped, the arms that are done

    def at(name):
        return os.path.join(cfg.out, name)

    if not cfg.resume and rank() == 0:  # or this run, if it is killed, would be resumed with stages of the one before
        for name in ("base", "teacher", "sft", "sft-grpo", "sft-opd", "sft-dgrpo", "dgrpo"):
            shutil.rmtree(at(name), ignore_errors=True)
    if not cfg.student:
        tokenizer = tiny_tokenizer(task_words())
        rows = -(-tokenizer.n_vocab // 64) * 64
        shape = ModelConfig(vocab_size=rows, max_position_embeddings=max(4096, ctx), **PRESETS["tiny-student"])
        save(at("init"), new_model(shape, cfg.seed), tokenizer)
    data = write_data(cfg, tokenizer)
    test = read_examples(data["test"])
    for examples in (test, read_examples(data["rl"])):
        check_rewards(examples, cfg.judge, cfg.allow_code)
    common = dict(ctx=ctx, seed=cfg.seed, micro=cfg.micro, save_every=cfg.save_every, resume=cfg.resume)

    def fine_tune(name, model, data, steps, lr, **options):
        sft.main(sft.Config(model=model, data=data, out=at(name), steps=steps, lr=lr, **common, **options))
        gc.collect()  # FSDP2's modules are cycles: without this they outlive their stage
        return at(name)

    def reinforce(stage, name, model, **options):
        stage.main(stage.Config(model=model, data=data["rl"], out=at(name), steps=cfg.rl_steps, lr=cfg.rl_lr,
                                batch=cfg.batch, group=cfg.group, max_new=cfg.max_new, **common, **options))
        gc.collect()
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
    scoring = dict(judge=cfg.judge, allow_code=cfg.allow_code)
    dgrpo = dict(teacher=teacher, beta=cfg.beta, **scoring)
    arms = {"teacher": lambda: teacher, "base": lambda: base, "+SFT": lambda: start,
            "SFT+GRPO": lambda: reinforce(grpo, "sft-grpo", start, **scoring),
            "SFT+OPD": lambda: reinforce(opd, "sft-opd", start, teacher=teacher),
            "SFT+dGRPO": lambda: reinforce(grpo, "sft-dgrpo", start, **dgrpo),
            "dGRPO without SFT": lambda: reinforce(grpo, "dgrpo", base, **dgrpo)}
    done = gather(read_rows(log.path)[1:] if rank() == 0 else None)[0]
    results = {row["arm"]: row for row in done}
    for arm in [arm for arm in arms if arm not in results]:
        began_arm = time.time()
        path = arms[arm]()
        seconds = time.time() - began_arm
        model, tokenizer = load(path, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        judge = load_judge(cfg.judge, device) if cfg.judge else None
        rows = evaluate(model, tokenizer, test, ctx, cfg.max_new, seed=cfg.seed, progress=f"{'test':8} {arm}", judge=judge,
                        allow_code=cfg.allow_code, **(PAPER_DECODING if cfg.student else {}))
        results[arm] = dict(arm=arm, seed=cfg.seed, **summary(rows, cfg.train_len // 2), n=sum(row["n"] for row in rows),
                            steps=cfg.rl_steps, seconds=seconds, scores=rows)
        log(results[arm])
        del model, judge  # they would take memory from the next arm's training
    log.close()
    if rank() > 0:
        return
    results = [results[arm] for arm in arms]
    write_file(at("results.jsonl"), "".join(json.dumps(r) + "\n" for r in results).encode())
    write_file(at("results.md"), f"{table(results)}\n".encode())
    about = "" if cfg.test_data else f"; {cfg.test_n} test examples per task and length"
    if not cfg.test_data and cfg.test_len > cfg.train_len:
        about += f", {cfg.test_len} tokens is a length no stage has seen"
    minutes = (time.time() - began) / 60
    print(f"\nMean score in %, ± standard error{about}.\n\n{table(results)}\n\nThis took {minutes:.1f} minutes; see {cfg.out}/.")


if __name__ == "__main__":
    run(main, Config)
