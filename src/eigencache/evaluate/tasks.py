"""Generate synthetic retrieval tasks from the words of a tokenizer, without any data set.

An example is a context of exactly the requested length and the tokens of its answer. The context begins with the
tokenizer's bos token, if it has one. The rest are random words and the punctuation and question of the task.

To add a task, write a generator `(Vocabulary, length, depth, rng) -> Example` and decorate it with `@task`.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eigencache.errors import CorpusError, TokenizerMismatchError
from eigencache.models.load import LoadedModel

MIN_WORDS = 64
CUE, ANSWER = 8, 8  # tokens of the span to copy: the repeated first half, the expected second half
NEEDLE_KEY, NEEDLE_VALUE = 2, 4
HOPS = 4  # variables of one chain
_WORD_BEGINS = "Ġ▁"  # the space before a word, in byte-level and SentencePiece vocabularies


class Example(NamedTuple):
    """A context, its answer and the accuracy of a random choice among the possible answers in the context."""

    context: np.ndarray  # int64 [length]
    answer: np.ndarray  # int64 [at least 1]
    chance: float


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token ids from which contexts are built.

    Args:
        start: The bos token, or nothing if the tokenizer has none.
        words: int64 [words], ascending: ids of whole words, without special tokens and within the embedding.
        encode: Function from a text to its token ids, without special tokens.
    """

    start: list[int]
    words: np.ndarray
    encode: Callable[[str], list[int]]


Generate = Callable[[Vocabulary, int, float, np.random.Generator], Example]
"""A generator: from token ids, context length in tokens, depth (0 to 1) and random generator to an example."""


class Task(NamedTuple):
    """A registered generator of examples."""

    name: str
    has_depth: bool  # whether the requested item lies at a single position of the context
    generate: Generate


TASKS: dict[str, Task] = {}


def task(name: str, *, has_depth: bool) -> Callable[[Generate], Generate]:
    """Return a decorator that registers a generator of examples.

    Args:
        name: Name of the task.
        has_depth: Whether the requested item lies at a single position. If not, the generator receives depth 0 and must
            not use it.
    """

    def register(generate: Generate) -> Generate:
        TASKS[name] = Task(name, has_depth, generate)
        return generate

    return register


def task_named(name: str) -> Task:
    """Return the task of a name. Raises `CorpusError` if there is none."""
    if name not in TASKS:
        raise CorpusError(f"`tasks` {name}: no such task. Choose from {', '.join(TASKS)}.")
    return TASKS[name]


def vocabulary(loaded: LoadedModel) -> Vocabulary:
    """Return the words of a model's tokenizer: single tokens of a space and two or more ASCII letters.

    Raises:
        TokenizerMismatchError: The tokenizer has fewer than 64 words.
    """
    tokenizer: Any = loaded.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), loaded.embedded_ids))))
    special = set(tokenizer.all_special_ids)
    words = [i for i, piece in enumerate(pieces) if i not in special and _is_word(piece)]
    if len(words) < MIN_WORDS:
        raise TokenizerMismatchError(
            f"{loaded.name}: the tokenizer has {len(words)} tokens that are whole words. Retrieval tasks need {MIN_WORDS}. "
            "Set `tasks` to none (in Python: ())."
        )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Vocabulary(start, np.array(words, dtype=np.int64), lambda text: tokenizer.encode(text, add_special_tokens=False))


def _is_word(piece: str | None) -> bool:
    return bool(piece) and len(piece) > 2 and piece[0] in _WORD_BEGINS and piece[1:].isascii() and piece[1:].isalpha()


def examples(name: str, words: Vocabulary, length: int, depth: float, count: int, seed: int) -> list[Example]:
    """Return reproducible examples of a task; a larger `count` begins with the same examples.

    Args:
        name: Name of the task.
        words: Token ids from which contexts are built.
        length: Tokens per context.
        depth: Position of the requested item as a fraction of the context: 0 is the start, 1 is just before the question.
        count: Number of examples.
        seed: Seed of the random words.

    Raises:
        CorpusError: The task is unknown, `depth` is not in 0 to 1, the context is too short for the task, or it is so
            long that the vocabulary has too few words.
    """
    if not 0 <= depth <= 1:
        raise CorpusError(f"`depth` {depth}: must be a fraction of the context, from 0 to 1")
    chosen = task_named(name)
    depth = depth if chosen.has_depth else 0.0
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), length, round(1e6 * depth)])
    made = [chosen.generate(words, length, depth, rng) for _ in range(count)]
    return [Example(context.astype(np.int64), answer.astype(np.int64), chance) for context, answer, chance in made]


@task("copy", has_depth=True)
def copy(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for the second half of an earlier span of random words after its repeated first half."""
    span = _distinct("copy", words, CUE + ANSWER, rng)
    return _hidden("copy", words, length, depth, rng, span, span[:CUE], span[CUE:])


@task("induction", has_depth=True)
def induction(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for B in `… A B … A`, where A and B occur nowhere else."""
    pair = _distinct("induction", words, 2, rng)
    return _hidden("induction", words, length, depth, rng, pair, pair[:1], pair[1:])


@task("recall", has_depth=True)
def recall(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for the value of one key in a context of lines `key = value`; its line lies at `depth`."""
    equals, newline = words.encode(" ="), words.encode("\n")
    line = 2 + len(equals) + len(newline)
    question = 1 + len(equals)
    lines = _room("recall", length, len(words.start) + question, 2 * line) // line
    keys, values = _distinct("recall", words, 2 * lines, rng).reshape(2, lines)
    line_idx = round(depth * (lines - 1))
    text = [i for key, value in zip(keys, values, strict=True) for i in (key, *equals, value, *newline)]
    padding = _other(words, np.concatenate([keys, values]), length - len(words.start) - question - len(text), rng)
    context = np.array([*words.start, *padding, *text, keys[line_idx], *equals])
    return Example(context, values[line_idx : line_idx + 1], 1 / lines)


@task("needle", has_depth=True)
def needle(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for the four-word value of a two-word key, on one line `key = value` hidden among random words."""
    equals, newline = words.encode(" ="), words.encode("\n")
    chosen = _distinct("needle", words, NEEDLE_KEY + NEEDLE_VALUE, rng)
    key, value = chosen[:NEEDLE_KEY], chosen[NEEDLE_KEY:]
    line = [*newline, *key, *equals, *value, *newline]
    return _hidden("needle", words, length, depth, rng, line, [*newline, *key, *equals], value)


@task("variable tracking", has_depth=False)
def variable_tracking(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for all variables that hold a value, among interleaved chains X1 = value, X2 = X1, … (RULER).

    Differs from RULER: values are words, and other chains replace the filler text.
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
        source, name = names[chain, following[chain] : following[chain] + 2]
        text += [name, *equals, source, *newline]
        following[chain] += 1
    answer = names[rng.integers(chains)]
    padding = _other(words, names.ravel(), length - fixed - len(text), rng)
    context = np.array([*words.start, *padding, *text, *before, answer[0], *after])
    return Example(context, answer[1:], 1 / chains)


@task("common words", has_depth=False)
def common_words(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
    """Ask for the most frequent word of a shuffled list (RULER).

    The word fills a fifth of the list. Other words occur at most a quarter as often.
    """
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
    """Build a context of random words with `hidden` at `depth` and the question at the end."""
    fixed = len(words.start) + len(hidden) + len(question)
    filler = _other(words, np.asarray(hidden), _room(name, length, fixed, 1), rng)
    position = round(depth * len(filler))
    context = np.array([*words.start, *filler[:position], *hidden, *filler[position:], *question])
    return Example(context, answer, 1 / length)


def _room(name: str, length: int, fixed: int, needed: int) -> int:
    if length - fixed < needed:
        raise CorpusError(
            f"`lengths` {length}: too short for the task {name}, which needs contexts of at least {fixed + needed} tokens"
        )
    return length - fixed


def _distinct(name: str, words: Vocabulary, count: int, rng: np.random.Generator) -> np.ndarray:
    if count > len(words.words):
        raise CorpusError(
            f"{name}: contexts of this length need {count:,} different words, but the vocabulary has {len(words.words):,}. "
            "Use shorter contexts (`lengths`)."
        )
    return rng.choice(words.words, count, replace=False)


def _other(words: Vocabulary, used: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    left = np.setdiff1d(words.words, used)
    return rng.choice(left if len(left) else words.words, count)
