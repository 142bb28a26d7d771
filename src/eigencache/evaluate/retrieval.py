"""Measure retrieval with a compressed context: the model must rank every token of the answer first.

The correct earlier tokens of the answer are given, which finds the same exact answers as greedy generation. A task that
the model fails with the uncompressed cache cannot rate a codec and is reported as not applicable.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.errors import CorpusError
from eigencache.evaluate.prefix import WHOLE, Window, check_positions, read_prefix
from eigencache.evaluate.tasks import TASKS, Example, Vocabulary, examples, task_named, vocabulary
from eigencache.records.base import Interval
from eigencache.records.quality import Accuracy, Retrieval

UNCOMPRESSED = "uncompressed"
FLOOR = 0.1  # below this uncompressed accuracy, a loss of accuracy cannot be seen
_Z = 1.959964  # normal quantile of a two-sided 95 % interval


@torch.no_grad()
def evaluate_retrieval(
    session: Session,
    codecs: Mapping[str, Compressor],
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (256,),
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    count: int = 50,
    window: Window = WHOLE,
) -> Iterator[Retrieval]:
    """Measure the accuracy of every codec for each task, length and depth.

    Args:
        session: Model and settings to run it with. Its seed draws the examples.
        codecs: Codecs by name.
        tasks: Names of tasks. Default: all.
        lengths: Context lengths in tokens.
        depths: Positions of the requested item, as fractions of the context. Tasks without depth run once per length.
        count: Examples per result.
        window: Most recent tokens that stay uncompressed, and the encoding block size. Default: no window.

    Yields:
        One result per task, length and depth.

    Raises:
        CorpusError: A task is unknown, a length does not fit a task, or `count` or the batch size is below 1.
        ModelError: The model has too few positions.
        TokenizerMismatchError: The tokenizer has too few words.
    """
    words = checked_vocabulary(session, tasks=tasks, lengths=lengths, count=count)
    cells = [
        (name, length, depth)
        for name in (TASKS if tasks is None else tasks)
        for length in lengths
        for depth in (depths if task_named(name).has_depth else (None,))
    ]
    for done, (name, length, depth) in enumerate(cells, 1):
        made = examples(name, words, length, depth or 0.0, count, session.seed)
        yield score_examples(
            session,
            codecs,
            made,
            task=name,
            depth=depth,
            window=window,
        )
        session.on_progress("retrieval", done, len(cells))


def checked_vocabulary(
    session: Session, *, tasks: Sequence[str] | None = None, lengths: Sequence[int] = (256,), count: int = 50
) -> Vocabulary:
    """Return the words of the tokenizer, after checking that every task has examples of every length for the model.

    One example of each is made, and none is read. Arguments and errors are those of `evaluate_retrieval`.
    """
    if min(count, session.batch_size) < 1:
        raise CorpusError(f"`examples` {count}, `batch_size` {session.batch_size}: each must be at least 1")
    words = vocabulary(session.loaded)
    for name in TASKS if tasks is None else tasks:
        for length in lengths:
            (example,) = examples(name, words, length, 0.0, 1, session.seed)
            check_positions(session.loaded, length + len(example.answer))
    return words


@torch.no_grad()
def score_examples(
    session: Session,
    codecs: Mapping[str, Compressor],
    made: Sequence[Example],
    *,
    task: str,
    depth: float | None = None,
    window: Window = WHOLE,
) -> Retrieval:
    """Measure the accuracy of every codec on examples of one length.

    The task is applicable if the lower end of the uncompressed accuracy's interval exceeds both chance and 0.1. Otherwise
    codecs are not measured.

    Args:
        session: Model and settings to run it with.
        codecs: Codecs by name.
        made: Examples of equal context length.
        task: Name of the task.
        depth: Position of the requested item as a fraction of the context, or None.
        window: Most recent tokens that stay uncompressed, and the encoding block size. Default: no window.
    """
    chance = float(np.mean([example.chance for example in made]))
    threshold = max(chance, FLOOR)
    uncompressed = _accuracies(session, {UNCOMPRESSED: None}, made, window)[0]
    applicable = uncompressed.interval[0] > threshold
    return Retrieval(
        task=task,
        length=len(made[0].context),
        depth=depth,
        answer_tokens=len(made[0].answer),
        chance=chance,
        threshold=threshold,
        applicable=applicable,
        uncompressed=uncompressed,
        results=_accuracies(session, codecs, made, window) if applicable else [],
    )


def _accuracies(
    session: Session, codecs: Mapping[str, Compressor | None], made: Sequence[Example], window: Window
) -> list[Accuracy]:
    correct = dict.fromkeys(codecs, 0)
    for start in range(0, len(made) if codecs else 0, session.batch_size):
        batch = made[start : start + session.batch_size]
        contexts, answers = (
            torch.from_numpy(np.stack(x)).to(session.loaded.device)
            for x in ([e.context for e in batch], [e.answer for e in batch])
        )
        prefix = read_prefix(session.loaded, contexts[:, :-1])
        piece = torch.cat([contexts[:, -1:], answers[:, :-1]], 1)
        for name, codec in codecs.items():
            first = prefix.logits(piece, codec, window).argmax(-1)
            correct[name] += int((first == answers).all(1).sum())
    return [accuracy(name, right, len(made)) for name, right in correct.items()]


def accuracy(codec: str, correct: int, count: int) -> Accuracy:
    """Return the fraction of examples with all answer tokens ranked first, with its Wilson interval.

    Args:
        codec: Name of the codec.
        correct: Examples answered correctly.
        count: All examples.
    """
    return Accuracy(codec=codec, correct=correct, examples=count, interval=wilson_interval(correct, count))


def wilson_interval(successes: int, trials: int) -> Interval:
    """Return the 95 % score interval of a proportion (Wilson 1927), which lies in [0, 1] for all counts."""
    share, z2 = successes / trials, _Z * _Z
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)
