"""Retrieval tasks made of a tokenizer's own words: a context, and the tokens that answer it, known without any data.

Every context has exactly the length asked for and begins as the tokenizer begins a text; all else in it are words,
drawn with a seed, and the few signs and questions that give a task its form.

To add a task: write a generator `(Vocabulary, length, depth, rng) -> Example` and decorate it with `@task`.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eigencache.errors import CorpusError, TokenizerMismatchError
from eigencache.models.load import LoadedModel

MIN_WORDS = 64
CUE, ANSWER = 8, 8  # tokens of a span that is to be copied: those that are repeated, those that follow
NEEDLE_KEY, NEEDLE_VALUE = 2, 4
HOPS = 4  # variables of one chain
_WORD_BEGINS = "Ġ▁"  # how byte-level and SentencePiece vocabularies write the space before a word


class Example(NamedTuple):
    """A context, the answer to it, and how often the answer is right by taking a place of its kind at random."""

    context: np.ndarray  # Int64 [length]
    answer: np.ndarray  # Int64 [at least 1]
    chance: float


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What contexts are made of."""

    start: list[int]  # how the tokenizer begins a text: its bos token, or nothing
    words: np.ndarray  # Int64 [words], ascending: ids of whole words, none special, all known to the embedding
    encode: Callable[[str], list[int]]  # ids of a text, without special tokens


Generate = Callable[[Vocabulary, int, float, np.random.Generator], Example]


class Task(NamedTuple):
    """A registered generator of examples."""

    name: str
    has_depth: bool  # whether what is asked for lies at one place of the context
    generate: Generate


TASKS: dict[str, Task] = {}


def task(name: str, *, has_depth: bool) -> Callable[[Generate], Generate]:
    """Register a generator under a name; one without depth is given depth 0 and must not use it."""

    def register(generate: Generate) -> Generate:
        TASKS[name] = Task(name, has_depth, generate)
        return generate

    return register


def task_named(name: str) -> Task:
    """The task of that name. Raises `CorpusError`, naming all tasks."""
    if name not in TASKS:
        raise CorpusError(f"{name}: no such task; choose from {', '.join(TASKS)}")
    return TASKS[name]


def vocabulary(loaded: LoadedModel) -> Vocabulary:
    """The words of the model's tokenizer: a space and two or more ASCII letters, one token.

    Raises `TokenizerMismatchError` where there are fewer than 64.
    """
    tokenizer: Any = loaded.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), loaded.embedded_ids))))
    special = set(tokenizer.all_special_ids)
    words = [i for i, piece in enumerate(pieces) if i not in special and _is_word(piece)]
    if len(words) < MIN_WORDS:
        raise TokenizerMismatchError(
            f"{loaded.name}: the tokenizer has {len(words)} tokens that are whole words, retrieval tasks need {MIN_WORDS}: "
            "measure likelihood instead"
        )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Vocabulary(start, np.array(words, dtype=np.int64), lambda text: tokenizer.encode(text, add_special_tokens=False))


def _is_word(piece: str | None) -> bool:
    return bool(piece) and len(piece) > 2 and piece[0] in _WORD_BEGINS and piece[1:].isascii() and piece[1:].isalpha()


def examples(name: str, words: Vocabulary, length: int, depth: float, count: int, seed: int) -> list[Example]:
    """`count` examples that depend on nothing but the arguments; a larger count begins with the same ones.

    `depth`: 0 puts what is asked for at the start of the context, 1 before the question. Raises `CorpusError` for a
    context that is too short for the task, or so long that the vocabulary has too few words.
    """
    if not 0 <= depth <= 1:
        raise CorpusError(f"depth {depth}: a depth is a share of the context, from 0 to 1")
    chosen = task_named(name)
    depth = depth if chosen.has_depth else 0.0
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), length, round(1e6 * depth)])
    made = [chosen.generate(words, length, depth, rng) for _ in range(count)]
    return [Example(context.astype(np.int64), answer.astype(np.int64), chance) for context, answer, chance in made]


@task("copy", has_depth=True)
def copy(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """A span of random words occurs, later its first half occurs again: the second half follows."""
    span = _distinct("copy", words, CUE + ANSWER, rng)
    return _hidden("copy", words, length, depth, rng, span, span[:CUE], span[CUE:])


@task("induction", has_depth=True)
def induction(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """… A B … A: B follows; neither occurs elsewhere."""
    pair = _distinct("induction", words, 2, rng)
    return _hidden("induction", words, length, depth, rng, pair, pair[:1], pair[1:])


@task("recall", has_depth=True)
def recall(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Lines `key = value` fill the context; one key is asked for, its line at `depth`."""
    equals, newline = words.encode(" ="), words.encode("\n")
    line = 2 + len(equals) + len(newline)
    question = 1 + len(equals)
    lines = _room("recall", length, len(words.start) + question, 2 * line) // line
    keys, values = _distinct("recall", words, 2 * lines, rng).reshape(2, lines)
    asked = round(depth * (lines - 1))
    text = [i for key, value in zip(keys, values, strict=True) for i in (key, *equals, value, *newline)]
    padding = _other(words, np.concatenate([keys, values]), length - len(words.start) - question - len(text), rng)
    context = np.array([*words.start, *padding, *text, keys[asked], *equals])
    return Example(context, values[asked : asked + 1], 1 / lines)


@task("needle", has_depth=True)
def needle(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """One line, two words ` = ` four words, lies in random words; its first two words are asked for."""
    equals, newline = words.encode(" ="), words.encode("\n")
    chosen = _distinct("needle", words, NEEDLE_KEY + NEEDLE_VALUE, rng)
    key, value = chosen[:NEEDLE_KEY], chosen[NEEDLE_KEY:]
    line = [*newline, *key, *equals, *value, *newline]
    return _hidden("needle", words, length, depth, rng, line, [*newline, *key, *equals], value)


@task("variable tracking", has_depth=False)
def variable_tracking(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Chains X1 = value, X2 = X1, … are interleaved; all variables that hold one value are asked for (RULER).

    Values are words here, and other chains take the place of RULER's filler.
    """
    equals, newline = words.encode(" ="), words.encode("\n")
    line = 2 + len(equals) + len(newline)
    before = words.encode("\nQuestion: find all variables that are assigned the value")
    after = words.encode(" in the text above.\nAnswer:")
    fixed = len(words.start) + len(before) + 1 + len(after)
    chains = _room("variable tracking", length, fixed, 2 * HOPS * line) // (HOPS * line)
    names = _distinct("variable tracking", words, chains * (HOPS + 1), rng).reshape(chains, HOPS + 1)
    following = np.zeros(chains, dtype=np.int64)
    text: list[int] = []
    for chain in rng.permutation(np.repeat(np.arange(chains), HOPS)):
        given, name = names[chain, following[chain] : following[chain] + 2]
        text += [name, *equals, given, *newline]
        following[chain] += 1
    asked = names[rng.integers(chains)]
    padding = _other(words, names.ravel(), length - fixed - len(text), rng)
    context = np.array([*words.start, *padding, *text, *before, asked[0], *after])
    return Example(context, asked[1:], 1 / chains)


@task("common words", has_depth=False)
def common_words(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """One word fills a fifth of a shuffled list, every other at most a quarter as much: it is asked for (RULER)."""
    question = words.encode("\nQuestion: which word occurs most often in the text above?\nAnswer:")
    room = _room("common words", length, len(words.start) + len(question), 10)
    common = room // 5
    repeats = max(1, common // 4)
    others = -(-(room - common) // repeats)
    chosen = _distinct("common words", words, 1 + others, rng)
    text = np.concatenate([np.full(common, chosen[0]), np.repeat(chosen[1:], repeats)[: room - common]])
    return Example(np.array([*words.start, *rng.permutation(text), *question]), chosen[:1], 1 / (1 + others))


def _hidden(
    name: str,
    words: Vocabulary,
    length: int,
    depth: float,
    rng: np.random.Generator,
    hidden: Sequence[int] | np.ndarray,
    question: Sequence[int] | np.ndarray,
    answer: np.ndarray,
) -> Example:
    """`hidden` at `depth` of random words that do not occur in it, then the question."""
    fixed = len(words.start) + len(hidden) + len(question)
    filler = _other(words, np.asarray(hidden), _room(name, length, fixed, 1), rng)
    at = round(depth * len(filler))
    context = np.array([*words.start, *filler[:at], *hidden, *filler[at:], *question])
    return Example(context, answer, 1 / length)


def _room(name: str, length: int, fixed: int, needed: int) -> int:
    if length - fixed < needed:
        raise CorpusError(f"{name}: a context of {length} tokens is too short, the task needs {fixed + needed}")
    return length - fixed


def _distinct(name: str, words: Vocabulary, count: int, rng: np.random.Generator) -> np.ndarray:
    if count > len(words.words):
        raise CorpusError(
            f"{name}: a context of this length needs {count:,} different words, the vocabulary has {len(words.words):,}: "
            "ask for shorter contexts"
        )
    return rng.choice(words.words, count, replace=False)


def _other(words: Vocabulary, used: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    left = np.setdiff1d(words.words, used)
    return rng.choice(left if len(left) else words.words, count)
