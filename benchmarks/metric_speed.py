"""Time of measuring a metric, relative to a plain forward pass on the same tokens.

    python benchmarks/metric_speed.py [--tokens 32768] [--repeats 3] [MODEL …]

The plain forward pass is that of `probe_speed.py` in batches of 4, the batch size of the metrics. The ratio is that of the
fastest repetitions. `fisher` is a forward pass with logits and a backward pass through activations; `attention` needs only
queries and keys.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console

from eigencache.calibration.attention_metric import attention_metrics
from eigencache.calibration.fisher_metric import fisher_metrics
from eigencache.calibration.session import Session
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.models.load import load
from eigencache.models.rope_detection import rotations_of
from eigencache.models.sources import BUNDLED
from eigencache.report.core.table import Table
from probe_speed import plain_pass

BATCH_SIZE = 4


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BUNDLED), help="models; default: all bundled models")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens; default: 32768")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the fastest counts; default: 3")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        loaded = load(name)
        sequences = pack(read_text("stdlib"), loaded.tokenizer, tokens=args.tokens, max_length=loaded.default_length)
        rotations = rotations_of(loaded)
        plain_pass(loaded, sequences, BATCH_SIZE)  # warm-up
        times = [
            (
                plain_pass(loaded, sequences, BATCH_SIZE),
                seconds(partial(fisher_metrics, Session(loaded, batch_size=BATCH_SIZE), sequences, rotations)),
                seconds(partial(attention_metrics, Session(loaded, batch_size=BATCH_SIZE), sequences, rotations)),
            )
            for _ in range(args.repeats)
        ]
        plain, fisher, attention = (min(column) for column in zip(*times, strict=True))
        rows.append((name, f"{sequences.corpus.tokens:,}", f"{fisher / plain:.2f}", f"{attention / plain:.2f}"))
    note = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, fastest of {args.repeats}"
    columns = ("Model", "Tokens", "Fisher", "Attention")
    Console().print(Table("Time of metrics / time of a plain forward pass", columns, tuple(rows), notes=(note,)))


if __name__ == "__main__":
    main()
