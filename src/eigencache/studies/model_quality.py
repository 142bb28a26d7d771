"""Measure held-out loss by position and in-context copying, for the model cards.

A model that does not predict well has no cache worth measuring, so these figures are published with the bundled models.
"""

import torch
from torch.nn import functional as F

from eigencache.calibration.pass_memory import affordable_rows, check_whole_pass, described
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.records.probe import ScoreRecord
from eigencache.records.provenance import Stopwatch

COPY_ROWS, COPY_SPAN = 64, 64
BUCKETS = (256, 512, 1024, 2048)


@torch.no_grad()
def score_model(session: Session, sequences: Sequences) -> ScoreRecord:
    """Measure the held-out loss in nats per token, overall and by position, and the copy accuracy.

    Positions are grouped up to 256, 512, 1,024 and 2,048 tokens.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.

    Raises:
        StatisticsError: A pass needs more memory than the session allows.
    """
    watch = Stopwatch()
    model = session.loaded.model
    session.require_readable(sequences)
    needed = check_whole_pass(session, max(map(len, sequences.ids)))
    session.on_progress(described(needed, session.memory), 0, 1)
    longest = max(map(len, sequences.ids)) - 1
    total, count = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    for done, ids in enumerate(sequences.ids, 1):
        row = torch.from_numpy(ids)[None].to(session.loaded.device)
        with watch:
            logits = model(input_ids=row, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="none").double().cpu()
        total[: len(loss)] += loss
        count[: len(loss)] += 1
        session.on_progress("scoring", done, len(sequences.ids))
    edges = [bucket for bucket in BUCKETS if bucket <= longest + 1]
    by_position = {bucket: _mean(total, count, low, bucket) for low, bucket in zip([0, *edges], edges, strict=False)}
    return ScoreRecord(
        model=session.loaded.name,
        corpus=sequences.corpus,
        loss_nats=float(total.sum() / count.sum()),
        loss_by_position=by_position,
        copy_accuracy=copy_accuracy(session),
        run=watch.run(session.seed, {}),
    )


def copy_accuracy(session: Session) -> float:
    """Return the accuracy of in-context copying: the share of tokens 2 to 64 of a repeated span that rank first.

    The span has 64 random tokens. The mean is over 64 spans.
    """
    generator = torch.Generator().manual_seed(session.seed)
    span = torch.randint(1, len(session.loaded.tokenizer), (COPY_ROWS, COPY_SPAN), generator=generator).to(
        session.loaded.device
    )
    right = 0
    for rows in span.split(affordable_rows(session.loaded, COPY_ROWS, 2 * COPY_SPAN)):
        logits = session.loaded.model(input_ids=torch.cat([rows, rows], 1), use_cache=False).logits
        right += int((logits[:, COPY_SPAN:-1].argmax(-1) == rows[:, 1:]).sum())
    return right / (COPY_ROWS * (COPY_SPAN - 1))


def _mean(total: torch.Tensor, count: torch.Tensor, low: int, high: int) -> float:
    return float(total[low:high].sum() / count[low:high].sum())
