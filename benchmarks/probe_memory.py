"""Peak memory of a probe: independent of the number of tokens, and below 16 GiB at the width of a 7B model.

    python benchmarks/probe_memory.py

Each case runs in a separate process. The first cases probe ref-llama on 25,000 to 200,000 tokens. The case `7B` computes the
moments of 32 layers with 8 × 128 KV heads (keys in two frames, and values, at the scopes `head` and `layer`) from synthetic
vectors, and the spectra of one layer.
"""

import argparse
import subprocess
import sys

import torch
from rich.console import Console

from eigencache.calibration.session import Session
from eigencache.report.core.table import Table

LAYERS, HEADS, DIM = 32, 8, 128
NAMES = ("keys_pre_rope", "keys_post_rope", "values")


def probe_tokens(tokens: int) -> None:
    """Probe ref-llama on a number of tokens and print tokens and peak memory in MB."""
    from eigencache.corpora.resolve import read_text
    from eigencache.corpora.sequences import pack
    from eigencache.models.load import load
    from eigencache.studies.probe import probe_model

    loaded = load("ref-llama")
    record = probe_model(Session(loaded), pack(read_text("stdlib"), loaded.tokenizer, tokens=tokens, max_length=512))
    print(record.corpus.tokens, record.run.peak_memory_mb)


def seven_billion() -> None:
    """Compute the statistics of a 7B geometry and print tokens and peak memory in MB."""
    from eigencache.calibration.accumulator import Accumulator, shapes_of
    from eigencache.calibration.session import MEMORY
    from eigencache.records.provenance import peak_memory_mb
    from eigencache.spectral.measure import measure

    batch, length, sequences = 4, 512, 16
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: {i: torch.randn(batch, HEADS, length, DIM, generator=generator) for i in range(LAYERS)} for name in NAMES
    }
    accumulator = Accumulator(shapes_of(tensors), ("head", "layer"), sequences=sequences, budget=MEMORY)
    for start in range(0, sequences, batch):
        accumulator.add(tensors, range(start, start + batch), [length] * batch)
    for place, moments in accumulator.places():
        if place.layer_idx == 0:
            measure(place, moments, centered=True, distinct_contexts=sequences * length)
    print(sequences * length, peak_memory_mb())


def main() -> None:
    """Run the benchmark and print its table."""
    cases = ("25000", "50000", "100000", "200000", "7B")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=cases, help="run this case only, in this process; prints tokens and MB")
    if case := parser.parse_args().case:
        seven_billion() if case == "7B" else probe_tokens(int(case))
        return
    rows = []
    for case in cases:
        output = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True).stdout
        tokens, peak = output.split()[-2:]
        name = "7B geometry, synthetic" if case == "7B" else "ref-llama"
        rows.append((name, f"{int(tokens):,}", f"{float(peak) / 1024:.2f}"))
    Console().print(Table("Peak memory of a probe", ("Model", "Tokens", "Peak GiB"), tuple(rows)))


if __name__ == "__main__":
    main()
