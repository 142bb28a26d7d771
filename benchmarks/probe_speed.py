"""Time of a probe, relative to a plain forward pass on the same tokens.

    python benchmarks/probe_speed.py [--tokens 131072] [--repeats 3] [MODEL …]

A plain forward pass is `model(input_ids)` without gradients, in the batches of the probe, including logits. Probe and plain
pass alternate; the ratio is that of their fastest repetitions. The probe is `probe_model` with default settings: capture,
moments, spectra of every scope, intervals and the demonstration.
"""

import argparse
import time

import torch
from rich.console import Console

from eigencache.calibration.session import Session
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.models.load import LoadedModel, load
from eigencache.models.sources import BUNDLED
from eigencache.report.core.table import Table
from eigencache.studies.probe import probe_model

BATCH_SIZE = 8


def plain_pass(loaded: LoadedModel, sequences: Sequences, batch_size: int) -> float:
    """Return the seconds of forward passes over all sequences."""
    began = time.perf_counter()
    with torch.no_grad():
        for input_ids, attention_mask, _ in sequences.batches(batch_size, pad_id=0):
            loaded.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return time.perf_counter() - began


def probe_pass(loaded: LoadedModel, sequences: Sequences) -> float:
    """Return the seconds of one probe."""
    began = time.perf_counter()
    probe_model(Session(loaded), sequences)
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BUNDLED), help="models; default: all bundled models")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens; default: 131072")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the fastest counts; default: 3")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        loaded = load(name)
        sequences = pack(read_text("stdlib"), loaded.tokenizer, tokens=args.tokens, max_length=loaded.default_length)
        plain_pass(loaded, Sequences(sequences.ids[:8], sequences.corpus), 8)  # warm
        times = [(plain_pass(loaded, sequences, BATCH_SIZE), probe_pass(loaded, sequences)) for _ in range(args.repeats)]
        plain, probe = (min(column) for column in zip(*times, strict=True))
        rows.append((name, f"{sequences.corpus.tokens:,}", f"{probe / plain:.2f}"))
    note = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, fastest of {args.repeats}"
    title = "Time of a probe / time of a plain forward pass"
    Console().print(Table(title, ("Model", "Tokens", "Time ratio"), tuple(rows), notes=(note,)))


if __name__ == "__main__":
    main()
