"""Retrieval through the cache: the context is held encoded, and all tokens of the answer must be ranked first.

The answer is read with its own earlier tokens given, which finds the same exact answers as greedy generation. A task
that the model cannot do on its uncompressed cache says nothing of a codec: it is reported as not applicable.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.errors import CorpusError
from eigencache.evaluate.prefix import WHOLE, Window, check_positions, read_prefix
from eigencache.evaluate.tasks import TASKS, Example, examples, task_named, vocabulary
from eigencache.records.base import Interval
from eigencache.records.quality import Accuracy, Retrieval

UNCOMPRESSED = "uncompressed"
FLOOR = 0.1  # a task that is done less often than this leaves no room to see a loss
_Z = 1.959964  # of a two-sided 95 % interval


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
    """One result per task, length and depth, as they come.

    `tasks`: names, all by default; one without depth is done once per length. Raises `CorpusError` for an unknown
    task and for lengths that do not fit a task, `ModelError` where the model has too few positions.
    """
    if min(count, session.batch_size) < 1:
        raise CorpusError(f"{count} examples, {session.batch_size} at a time: at least 1 of each is needed")
    words = vocabulary(session.loaded)
    cells = [
        (name, length, depth)
        for name in (TASKS if tasks is None else tasks)
        for length in lengths
        for depth in (depths if task_named(name).has_depth else (None,))
    ]
    for done, (name, length, depth) in enumerate(cells, 1):
        made = examples(name, words, length, depth or 0.0, count, session.seed)
        check_positions(session.loaded, length + len(made[0].answer))
        yield score_examples(
            session,
            codecs,
            made,
            task=name,
            depth=depth,
            window=window,
        )
        session.on_progress("retrieval", done, len(cells))


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
    """Accuracy of every codec on examples of one length; none where the uncompressed cache does not do the task.

    The rule: the lower end of the uncompressed accuracy's interval lies above chance, and above 0.1.
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
    """The share of examples with all answer tokens ranked first, with its Wilson interval."""
    return Accuracy(codec=codec, correct=correct, examples=count, interval=wilson_interval(correct, count))


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % score interval of a share (Wilson 1927), in [0, 1] also for none and for all of few trials."""
    share, z2 = successes / trials, _Z * _Z
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)
