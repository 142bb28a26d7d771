"""Speed of the `eigen` codec on one core, in MB of 16-bit cache per second: the whole codec and its entropy coder.

    python benchmarks/codec_speed.py [MODEL …] [--bits 0.1,0.4,1.6] [--context 512] [--tokens 65536] [--repeats 9] [--parts]

Whole codec: from keys and values in 16 bits to a container and back (transform, quantizer, entropy coder, checksums), with
and without token prediction. Entropy coder: from integers to bytes and back, in blocks of 128 tokens. zstd at level 1
(`zstd -1`) codes the same integers in 8 bits, with larger ones appended. The cache comes from held-out text. Times are
medians; all methods run in turn in every repetition. `--parts` adds the time of every step.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from eigencache.codec.base import Cached
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.layout import by_layer
from eigencache.evaluate.speed import in_turn
from eigencache.fitting.eigen import EigenFit, EigenSettings
from eigencache.fitting.eigen_search import at_bits
from eigencache.models.load import load
from eigencache.models.sources import BUNDLED
from eigencache.report.core.table import Table
from entropy import Bytes, fitted_codecs, zstandard

COLUMNS = (
    "Model, bits requested",
    "Kept",
    "Encode",
    "Decode",
    "rANS enc",
    "rANS dec",
    "zstd enc",
    "zstd dec",
    "enc ÷",
    "dec ÷",
)
STEPS = (
    "encode",
    "to vectors",
    "find tokens",
    "predict",
    "weigh",
    "quantize",
    "rANS enc",
    "decode",
    "first layers",
    "rANS dec",
    "dequantize",
    "weigh back",
    "to slots",
)

_CPU = torch.device("cpu")


def cache_of(fit: EigenFit, tokens: int, dtype: torch.dtype) -> Cached:
    """Return a cache of held-out tokens after the sinks.

    Args:
        fit: A fit with vectors of held-out sequences.
        tokens: Number of tokens.
        dtype: Dtype of the cache.
    """
    held = fit.held.vectors
    x = held.samples.vectors(held.rows[:tokens])
    if fit.positions is not None:
        x = x + fit.positions.at(torch.arange(fit.sinks, fit.sinks + len(x)))
    return by_layer(fit.layout.slots(x[None], fit.sinks), dtype)


def integers(codec: EigenCodec, cached: Cached, start: int) -> list[np.ndarray]:
    """Return the input of the entropy coder by block, each [coefficients, tokens]."""
    symbols = codec._symbols(codec._stored(cached, start), {})[0].numpy()
    return [np.ascontiguousarray(symbols[first : first + codec.block].T) for first in range(0, len(symbols), codec.block)]


def whole_and_entropy(codec: EigenCodec, cached: Cached, start: int, repeats: int) -> dict[str, float]:
    """Return the seconds of every column of the table.

    Args:
        codec: A fitted codec.
        cached: The cache to encode.
        start: Position of its first token.
        repeats: Timed repetitions.
    """
    blocks, coder = integers(codec, cached, start), codec._coder
    zstd = Bytes(len(blocks[0]), zstandard.ZstdCompressor(level=1).compress, zstandard.ZstdDecompressor().decompress)
    encoded = codec.encode(cached, start)
    coded, zipped = ([stage.encode(block) for block in blocks] for stage in (coder, zstd))
    pairs, zipped_pairs = ([*zip(data, (b.shape[1] for b in blocks), strict=True)] for data in (coded, zipped))
    for (data, tokens), block in zip(pairs, blocks, strict=True):
        assert np.array_equal(coder.decode(data, tokens), block)
    return in_turn(
        {
            "encode": lambda: codec.encode(cached, start),
            "decode": lambda: codec.decode(encoded),
            "rans encode": lambda: [coder.encode(block) for block in blocks],
            "rans decode": lambda: [coder.decode(*pair) for pair in pairs],
            "zstd encode": lambda: [zstd.encode(block) for block in blocks],
            "zstd decode": lambda: [zstd.decode(*pair) for pair in zipped_pairs],
        },
        repeats,
        _CPU,
    )


def parts(codec: EigenCodec, cached: Cached, start: int, repeats: int) -> dict[str, float]:
    """Return the seconds of every single step of encoding and decoding; arguments as for `whole_and_entropy`.

    "first layers" is the time until the first stage of all layers is decoded (`EigenCodec.decode_layers`).
    """
    encoded = codec.encode(cached, start)
    layout, transform, quantizer, text = codec.layout, codec.transform, codec.quantizer, codec.text
    x = codec._stored(cached, start) - transform.mean
    ranks = None if text is None else text.find(x)
    z, first = transform.weighed(x), codec._first(ranks)
    q = transform.quantize(z, codec.step, quantizer, first)
    decoded = transform.dequantize(q, codec.step, quantizer, first)
    back = transform.mean + transform.centered(decoded)
    works: dict[str, Callable[[], object]] = {
        "first layers": lambda: next(codec.decode_layers(encoded)),
        "to vectors": lambda: codec._stored(cached, start),
        "weigh": lambda: transform.weighed(x),
        "quantize": lambda: transform.quantize(z, codec.step, quantizer, first),
        "dequantize": lambda: transform.dequantize(q, codec.step, quantizer, first),
        "weigh back": lambda: transform.centered(decoded),
        "to slots": lambda: layout.slots(back, start),
    }
    if text is not None and ranks is not None:
        works |= {"find tokens": lambda: text.find(x), "predict": lambda: text.predict(ranks, codec.block)}
    return in_turn(works, repeats, _CPU)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BUNDLED))
    parser.add_argument("--bits", default="0.1,0.4,1.6", help="bits per value of the container; default: 0.1,0.4,1.6")
    parser.add_argument("--context", type=int, default=512, help="tokens encoded at a time; default: 512")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens; default: 65536")
    parser.add_argument("--repeats", type=int, default=9, help="timed repetitions; the median is reported; default: 9")
    parser.add_argument("--parts", action="store_true", help="also time every step")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, steps, kept = [], [], []
    for name in args.models:
        loaded = load(name)
        for text in (True, False):
            fit = fitted_codecs(loaded, args.tokens, EigenSettings(text=text))
            cached = cache_of(fit, args.context, torch.float16)
            nbytes = 2 * args.context * fit.layout.width
            for bits in map(float, args.bits.split(",")):
                codec = replace(at_bits(fit, bits).codec, dtype=torch.float16)
                seconds = whole_and_entropy(codec, cached, fit.sinks, args.repeats)
                label = f"{name}, {bits:g}" + (", text" if text else "")
                speeds = {work: nbytes / taken / 1e6 for work, taken in seconds.items()}
                ratios = [seconds[f"zstd {way}"] / seconds[f"rans {way}"] for way in ("encode", "decode")]
                width = f"{codec.transform.coefficients} of {fit.layout.width}"
                rows.append((label, width, *(f"{s:,.0f}" for s in speeds.values()), *(f"{r:.2f}" for r in ratios)))
                kept.append({"label": label, "kept": width, "tokens": args.context, "mb_per_s": speeds, "seconds": seconds})
                if args.parts:
                    times = {"encode": seconds["encode"], "decode": seconds["decode"]}
                    times |= parts(codec, cached, fit.sinks, args.repeats)
                    times |= {"rANS enc": seconds["rans encode"], "rANS dec": seconds["rans decode"]}
                    kept[-1]["parts"] = times
                    steps.append((label, *(f"{1e3 * times[step]:.2f}" if step in times else "—" for step in STEPS)))
    note = f"CPU, one thread, torch {torch.__version__}; {args.context} tokens at a time; MB of 16-bit cache per second, "
    note += f"medians of {args.repeats}; ÷: speed of rANS / speed of zstd 1"
    console = Console()
    console.print(Table("eigen: speed on one core", COLUMNS, tuple(rows), notes=(note,)))
    if steps:
        console.print(Table("Time of every step, ms", ("Model, bits requested", *STEPS), tuple(steps)))
    if args.output:
        args.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
