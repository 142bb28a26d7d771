"""Metrics."""

from dataclasses import replace
from typing import Literal

from eigencache.corpora.sequences import Sequences

MetricName = Literal["frobenius", "attention", "fisher"]


METRIC_TOKENS = 32_768


def spread_out(sequences: Sequences, tokens: int) -> Sequences:
    """Sequences from all over the text with `tokens` tokens or a little more: metrics need less than bases."""
    step = max(1, sequences.corpus.tokens // tokens)
    return replace(sequences, ids=sequences.ids[::step])
