"""Comparison of entropy coders on the integers of a fitted `eigen` codec: bytes relative to the ideal length, and speed.

    python benchmarks/entropy.py [MODEL …] [--bits 0.1,0.4,1.6] [--tokens 65536] [--repeats 3] [--contexts] [--output JSON]

The integers are the quantized coefficients of held-out sequences, without the digits of tokens. Every coder maps int32
[coefficients, tokens] to bytes that decode independently: blocks of 128 tokens, as random access needs, and the whole text.
The ideal length is Σ −log₂ p, with p the share of an integer in the text that the tables are fitted on, one distribution
per class of coefficients. Speed is measured on one thread, from integers to bytes and back, including conversions; tables
and models are built before. All coders are verified to be lossless. `--contexts` computes ideal lengths with 6 tables per
class, which the earlier coefficients of a token select.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console

from eigencache.calibration.calibration_set import CalibrationSet, calibration_length
from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.entropy_coder import EntropyCoder, RansCoder
from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.fitting.eigen import EigenFit, EigenSettings, Source, fit_eigen
from eigencache.fitting.eigen_search import at_bits
from eigencache.models.load import LoadedModel, load
from eigencache.models.sources import BUNDLED
from eigencache.report.core.table import Table

try:
    import constriction
    import pcodec
    import zstandard
except ImportError as error:
    raise SystemExit(f"{error}: install the other coders with `pip install pcodec constriction zstandard`") from error

DEFAULTS = EigenSettings()
BLOCK = 128
ROWS = 4096  # vectors at a time
CONTEXTS = 6
_MEMORY = 0.9  # decay of the running magnitude from one coefficient to the next
_UNSEEN = 0.5  # count of all integers that do not occur in the calibration text
_BACKING = 32  # prior count of every context, distributed like its class


class Models:
    """Shares of the integers of every class in a calibration text; an integer that does not occur is an escape of 32 bits.

    Args:
        fitted: Integers of the calibration text [coefficients, tokens].
        table_of: Class of every coefficient [coefficients].
    """

    def __init__(self, fitted: np.ndarray, table_of: np.ndarray) -> None:
        self.table_of, self.halves, self.shares = table_of, [], []
        for table in range(int(table_of.max()) + 1):
            values = fitted[table_of == table].ravel()
            half = int(np.abs(values).max()) + 1
            counts = np.append(np.bincount(values + half, minlength=2 * half + 1), _UNSEEN)
            self.halves.append(half)
            self.shares.append(counts / counts.sum())

    def indexed(self, symbols: np.ndarray, table: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the integers of one class in its shares, and the escaped integers."""
        values, half = symbols[self.table_of == table].ravel(), self.halves[table]
        inside = np.abs(values) <= half
        seen = self.shares[table][np.where(inside, values + half, -1)] > 0
        return np.where(inside & seen, values + half, 2 * half + 1), values[~(inside & seen)]

    def bits(self, symbols: np.ndarray) -> float:
        """Return the ideal length of integers [coefficients, tokens] in bits."""
        total = 0.0
        for table, shares in enumerate(self.shares):
            index, escaped = self.indexed(symbols, table)
            total += -np.log2(shares[index]).sum() + 32 * len(escaped)
        return float(total)


@dataclass(frozen=True)
class Bytes:
    """A byte coder on int8 integers, coefficient by coefficient; −128 marks an integer that is appended in 32 bits."""

    width: int
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes | memoryview], bytes]

    def encode(self, symbols: np.ndarray) -> bytes:
        """As `EntropyCoder`."""
        narrow = symbols.astype(np.int8)
        wide = (narrow != symbols) | (narrow == -128)
        if not wide.any():
            return self.compress(narrow.tobytes())
        narrow[wide] = -128
        return self.compress(narrow.tobytes() + symbols[wide].tobytes())

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """As `EntropyCoder`."""
        raw, count = self.decompress(data), self.width * tokens
        symbols = np.frombuffer(raw, np.int8, count).astype(np.int32)
        if count < len(raw):
            symbols[symbols == -128] = np.frombuffer(raw[count:], np.int32)
        return symbols.reshape(self.width, tokens)


class Pcodec:
    """pcodec at level 8 on int16 (int32 if necessary): one stream per class of coefficients, preceded by its length."""

    def __init__(self, table_of: np.ndarray) -> None:
        self.rows = rows_of(table_of)
        self.config = pcodec.ChunkConfig(compression_level=8, delta_spec=pcodec.DeltaSpec.no_op())

    def encode(self, symbols: np.ndarray) -> bytes:
        """As `EntropyCoder`."""
        symbols = symbols.astype(np.int16 if np.abs(symbols).max() < 2**15 else np.int32)
        parts = [pcodec.standalone.simple_compress(symbols[rows].ravel(), self.config) for rows in self.rows]
        return b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """As `EntropyCoder`."""
        symbols, start = np.empty((sum(map(len, self.rows)), tokens), np.int32), 0
        for rows in self.rows:
            end = start + 4 + int.from_bytes(data[start : start + 4], "little")
            symbols[rows] = pcodec.standalone.simple_decompress(data[start + 4 : end]).reshape(-1, tokens)
            start = end
        return symbols


class Constriction:
    """The ANS coder of `constriction` with a categorical model of 24-bit shares per class, preceded by the escapes."""

    def __init__(self, models: Models) -> None:
        self.models, self.rows = models, rows_of(models.table_of)
        self.coded = [constriction.stream.model.Categorical(shares, perfect=False) for shares in models.shares]

    def encode(self, symbols: np.ndarray) -> bytes:
        """As `EntropyCoder`."""
        coder, escapes = constriction.stream.stack.AnsCoder(), []
        for table in range(len(self.rows) - 1, -1, -1):
            index, escaped = self.models.indexed(symbols, table)
            coder.encode_reverse(index.astype(np.int32), self.coded[table])
            escapes.insert(0, escaped.astype(np.int32))
        beyond = np.concatenate(escapes)
        return len(beyond).to_bytes(4, "little") + beyond.tobytes() + coder.get_compressed().astype("<u4").tobytes()

    def decode(self, data: bytes | memoryview, tokens: int) -> np.ndarray:
        """As `EntropyCoder`."""
        escaped = np.frombuffer(data, np.int32, int.from_bytes(data[:4], "little"), 4)
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(data, "<u4", offset=4 + escaped.nbytes))
        symbols, used = np.empty((len(self.models.table_of), tokens), np.int32), 0
        for rows, half, model in zip(self.rows, self.models.halves, self.coded, strict=True):
            index = coder.decode(model, len(rows) * tokens)
            values = index - np.int32(half)
            if count := int((index > 2 * half).sum()):
                values[index > 2 * half] = escaped[used : used + count]
                used += count
            symbols[rows] = values.reshape(-1, tokens)
        return symbols


@dataclass(frozen=True)
class Result:
    """Result of one coder on one set of integers.

    `excess` is bytes / ideal length − 1. Speeds are in 10⁶ integers per second.
    """

    model: str
    bits_asked: float
    tokens: int
    coefficients: int
    integers: int
    ideal_bits_per_value: float
    coder: str
    blocks_of: int
    nbytes: int
    excess: float
    encode_msymbols: float
    decode_msymbols: float


def rows_of(table_of: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the coefficients of every class."""
    return [np.flatnonzero(table_of == table) for table in range(int(table_of.max()) + 1)]


def fitted_codecs(loaded: LoadedModel, tokens: int, settings: EigenSettings = DEFAULTS) -> EigenFit:
    """Return a fit on a number of tokens of `stdlib`."""
    text = pack(read_text("stdlib"), loaded.tokenizer, tokens=tokens, max_length=calibration_length(loaded))
    return fit_eigen(CalibrationSet(Session(loaded), text), settings)


def integers_of(fit: EigenFit, codec: EigenCodec) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers [coefficients, tokens] that the tables are fitted on and of held-out text, without digits."""
    whole = len(fit.held.vectors) // BLOCK * BLOCK
    return quantized(codec, fit.apart, len(fit.apart.vectors)), quantized(codec, fit.held, whole)


def quantized(codec: EigenCodec, source: Source, tokens: int) -> np.ndarray:
    """Return the integers [coefficients, tokens] of the first tokens of some vectors."""
    parts = []
    for rows in torch.arange(tokens).split(ROWS):
        z = source.vectors.columns(0, codec.layout.width, rows)
        first = None if source.first is None else source.first[rows]
        parts.append(codec.transform.quantize(z, codec.step, codec.quantizer, first))
    return np.ascontiguousarray(torch.cat(parts).T.numpy())


def without_tokens(codec: EigenCodec) -> EntropyTables:
    """Return the tables without those of the digits of tokens, which are the first rows with one table each."""
    tables, count = codec.tables, codec.text.digits.count if codec.text else 0
    return EntropyTables(
        tables.table_of[count:] - count, tables.shifts[count:], tables.halves[count:], tables.starts[count:]
    )


def coders(tables: EntropyTables, lanes: int, models: Models) -> Iterator[tuple[str, EntropyCoder]]:
    """Yield all coders by name."""
    yield f"rANS, {lanes} lanes (ours)", RansCoder(tables, lanes)
    yield "constriction ANS", Constriction(models)
    yield "pcodec 8, per class", Pcodec(tables.table_of)
    for level in (-1, 1, 19):
        zstd, unzstd = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        yield f"zstd {level}".replace("-", "−"), Bytes(len(tables.table_of), zstd.compress, unzstd.decompress)
    yield "zlib 6", Bytes(len(tables.table_of), zlib.compress, zlib.decompress)


def timed(work: Callable[[], list], repeats: int) -> tuple[list, float]:
    """Return the result of a function and its median time in seconds, without the first call."""
    result, seconds = work(), []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
    return result, median(seconds)


def measured(coder: EntropyCoder, symbols: np.ndarray, block: int, repeats: int) -> tuple[int, float, float]:
    """Return bytes, seconds of encoding and seconds of decoding; asserts that decoding is exact.

    Args:
        coder: The coder.
        symbols: Integers [coefficients, tokens].
        block: Tokens per block.
        repeats: Timed repetitions.
    """
    blocks = [np.ascontiguousarray(symbols[:, start : start + block]) for start in range(0, symbols.shape[1], block)]
    data, encoding = timed(lambda: [coder.encode(integers) for integers in blocks], repeats)
    pairs = list(zip(data, blocks, strict=True))
    decoded, decoding = timed(lambda: [coder.decode(coded, integers.shape[1]) for coded, integers in pairs], repeats)
    assert all(np.array_equal(result, integers) for result, integers in zip(decoded, blocks, strict=True))
    return sum(map(len, data)), encoding, decoding


def compare(name: str, fit: EigenFit, bits: float, repeats: int) -> Iterator[Result]:
    """Yield the results of every coder at one rate, in blocks and for the whole text.

    Args:
        name: Name of the model.
        fit: A fit of the model.
        bits: Bits per value.
        repeats: Timed repetitions.
    """
    codec = at_bits(fit, bits).codec
    tables = without_tokens(codec)
    fitted, symbols = integers_of(fit, codec)
    models = Models(fitted, tables.table_of)
    ideal = models.bits(symbols)
    width, tokens = symbols.shape
    for block in (BLOCK, tokens):
        for label, coder in coders(tables, codec.lanes, models):
            nbytes, encoding, decoding = measured(coder, symbols, block, repeats)
            speeds = (symbols.size / seconds / 1e6 for seconds in (encoding, decoding))
            per_value = ideal / tokens / fit.layout.width
            excess = 8 * nbytes / ideal - 1
            yield Result(name, bits, tokens, width, symbols.size, per_value, label, block, nbytes, excess, *speeds)


def losses(fit: EigenFit, bits: float) -> tuple[str, ...]:
    """Return the components of our bytes beyond the ideal length, as shares of it, for a row of a table."""
    codec = at_bits(fit, bits).codec
    tables = without_tokens(codec)
    fitted, symbols = integers_of(fit, codec)
    ideal, coder = Models(fitted, tables.table_of).bits(symbols), RansCoder(tables, codec.lanes)
    blocks = [symbols[:, start : start + BLOCK] for start in range(0, symbols.shape[1], BLOCK)]
    coded = 8 * sum(len(coder.encode(np.ascontiguousarray(block))) for block in blocks)
    in_tables = tables.bits(symbols)
    high = symbols >> tables.shifts[tables.table_of][:, None]
    escaped = int((np.abs(high) > tables.halves[tables.table_of][:, None]).sum())
    states = len(blocks) * codec.lanes * 16  # a state of 32 bits has 16 bits of coded data
    parts = (in_tables - ideal, states, coded - in_tables - states)
    return (*(f"{part / ideal:+.2%}" for part in parts), f"{escaped / symbols.size:.1e}", f"{coded / ideal - 1:+.2%}")


def contexts_of(symbols: np.ndarray, means: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each coefficient the running magnitude of the earlier ones of a token, relative to their means [tokens]."""
    running = np.ones(symbols.shape[1])
    for row, mean in zip(symbols, means, strict=True):
        yield running
        running = _MEMORY * running + (1 - _MEMORY) * np.abs(row) / mean


def in_contexts(fitted: np.ndarray, symbols: np.ndarray, table_of: np.ndarray) -> float:
    """Return the ideal length in bits if the running magnitude of the earlier integers of a token selects one of 6 tables.

    Args:
        fitted: Integers of the calibration text [coefficients, tokens].
        symbols: Integers of the held-out text [coefficients, tokens].
        table_of: Class of every coefficient [coefficients].
    """
    means = np.abs(fitted).mean(1) + 1e-3
    fitted_contexts, contexts = (np.stack(list(contexts_of(part, means))) for part in (fitted, symbols))
    total = 0.0
    for rows in rows_of(table_of):
        values, half = fitted[rows].ravel(), int(np.abs(fitted[rows]).max()) + 1
        edges = np.quantile(fitted_contexts[rows], np.linspace(0, 1, CONTEXTS + 1)[1:-1])
        chosen = np.searchsorted(edges, fitted_contexts[rows].ravel())
        counts = np.bincount(values + half, minlength=2 * half + 1)
        shares = np.append(counts, _UNSEEN) / (counts.sum() + _UNSEEN)
        tables = np.stack([np.bincount(values[chosen == i] + half, minlength=2 * half + 2) for i in range(CONTEXTS)])
        tables = (tables + _BACKING * shares) / (tables.sum(1, keepdims=True) + _BACKING)
        coded = symbols[rows].ravel()
        index = np.where(np.abs(coded) <= half, coded + half, -1)
        index = np.where(shares[index] > 0, index, -1)
        total += -np.log2(tables[np.searchsorted(edges, contexts[rows].ravel()), index]).sum() + 32 * (index == -1).sum()
    return float(total)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(BUNDLED), help="models; default: all bundled models")
    parser.add_argument("--bits", default="0.1,0.4,1.6", help="bits per value of the container; default: 0.1,0.4,1.6")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens, one in 8 held out and coded; default: 65536")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the median is reported; default: 3")
    parser.add_argument("--contexts", action="store_true", help="compute ideal lengths with contexts, without coders")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, rates, results = Console(), [float(bits) for bits in args.bits.split(",")], []
    spent, contexts = [], []
    for name in args.models:
        fit = fitted_codecs(load(name), args.tokens)
        for bits in rates:
            if args.contexts:
                codec = at_bits(fit, bits).codec
                fitted, symbols = integers_of(fit, codec)
                table_of, values = without_tokens(codec).table_of, symbols.shape[1] * fit.layout.width
                static = Models(fitted, table_of).bits(symbols) / values
                adaptive = in_contexts(fitted, symbols, table_of) / values
                contexts.append((f"{name}, {bits:g}", f"{static:.4f}", f"{adaptive:.4f}", f"{adaptive / static - 1:+.2%}"))
                continue
            measurements = list(compare(name, fit, bits, args.repeats))
            results += measurements
            spent.append((f"{name}, {bits:g}", *losses(fit, bits)))
            console.print(table_of_results(measurements))
    if args.contexts:
        columns = ("Model, bits requested", "Static, bits per value", "6 contexts", "Change")
        console.print(Table("Ideal length of coefficients, with static tables and with contexts", columns, tuple(contexts)))
    else:
        columns = ("Model, bits requested", "Tables", "States", "Other", "Share escaped", "Total")
        console.print(Table(f"rANS in blocks of {BLOCK}: bytes beyond the ideal length", columns, tuple(spent)))
    if args.output:
        args.output.write_text(json.dumps([asdict(result) for result in results] or contexts, indent=1) + "\n")


def table_of_results(results: list[Result]) -> Table:
    """Return a table of all coders at one rate of one model."""
    first, half = results[0], len(results) // 2
    rows = []
    for block, whole in zip(results[:half], results[half:], strict=True):
        speeds = (f"{speed:.1f}" for r in (block, whole) for speed in (r.encode_msymbols, r.decode_msymbols))
        b_enc, b_dec, w_enc, w_dec = speeds
        rows.append((block.coder, f"{block.excess:+.1%}", b_enc, b_dec, f"{whole.excess:+.1%}", w_enc, w_dec))
    columns = ("Coder", "Blocks: bytes", "encode", "decode", "Whole: bytes", "encode ", "decode ")
    title = (
        f"{first.model} at {first.bits_asked:g} bits per value: {first.coefficients} coefficients of {first.tokens:,} tokens"
    )
    ideal = f"bytes beyond the ideal length of static tables, {first.ideal_bits_per_value:.4f} bits per value"
    return Table(title, columns, tuple(rows), notes=(f"{ideal}; million integers per second, one thread, medians",))


if __name__ == "__main__":
    main()
