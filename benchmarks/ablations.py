"""Ablations of the `eigen` codec on one model: the tables of docs/ablations.md.

    python benchmarks/ablations.py ref-llama --parts scope,metric,text,block,kept,group,size,domain --output ablations.json

Rows are compared at equal bits per value, with all bytes counted, unless a row says otherwise. ΔNLL and KL are measured on
held-out text after an encoded prefix. Side information is divided over 1,000,000 stored tokens. Token prediction is off
unless a row names it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from rich.console import Console

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.base import Codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.errors import BudgetError
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.evaluate.prefix import KeptPrefixes
from eigencache.fitting.eigen import EigenFit, EigenSettings, fit_eigen
from eigencache.fitting.eigen_search import at_bits
from eigencache.models.load import LoadedModel, load
from eigencache.records.quality import Quality, ReadingProtocol
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell

PLAIN = EigenSettings(text=False)
CALIBRATION_LENGTH = 512  # tokens of a sequence that codecs are fitted on
SCORED = 128  # tokens at the end of a sequence
TOLERANCE = 0.02  # of the rate; the bits of a row are counted
AMORTIZED = 1_000_000  # tokens stored, over which side information is divided
COLUMNS = ("Bits", "Bits with side information", "ΔNLL", "KL")
TITLES = {
    "scope": "What a stage covers",
    "metric": "Metric and its exponent",
    "text": "Token prediction, with both metrics",
    "block": "Block size",
    "kept": "Sinks and window in 16 bits",
    "group": "Layers of a group",
    "size": "Calibration tokens and what a stage covers",
    "domain": "Fitted on one domain, tested on another",
}


@dataclass(frozen=True, eq=False)
class Case:
    """One row of a table: a codec that is fitted when it is needed, and its label."""

    part: str
    words: tuple[str, ...]
    rate: float  # requested bits per value
    fitted: Callable[[], Codec]

    def row(self, model: str, text: str) -> dict:
        """Return what identifies the row in a file."""
        return {"model": model, "part": self.part, "words": list(self.words), "rate": self.rate, "text": text}


class Ablations:
    """The ablations of one model; each part is a method with the name of the part, and its title is in `TITLES`.

    Args:
        loaded: The model.
        text: Specification of the calibration text.
        other: Specification of a text of another domain; None: no such rows.
        tokens: Calibration tokens.
        rates: Bits per value at which rows are compared.
        length: Tokens of a scored sequence, of which the last 128 are scored.
    """

    def __init__(
        self, loaded: LoadedModel, text: str, other: str | None, tokens: int, rates: tuple[float, ...], length: int
    ) -> None:
        self.loaded, self.calibration, self.other, self.tokens, self.rates = loaded, text, other, tokens, rates
        self.length, self.session = length, Session(loaded, batch_size=4)
        self.source = CalibrationSet(self.session, self.sequences(text, tokens))

    def sequences(self, text: str, tokens: int, length: int = CALIBRATION_LENGTH) -> Sequences:
        """Return a text in sequences of `length` tokens."""
        return pack(read_text(text), self.loaded.tokenizer, tokens=tokens, max_length=length)

    def cases(self, parts: list[str]) -> Iterator[Case]:
        """Yield the rows of the named parts."""
        for part in parts:
            yield from getattr(self, part)()

    def scope(self) -> Iterator[Case]:
        """Yield all scopes in their best metric."""
        for scope in ("head", "layer", "groups", "joint"):
            yield from self._at("scope", (scope,), replace(PLAIN, scope=scope))

    def metric(self) -> Iterator[Case]:
        """Yield groups of layers in all metrics."""
        for metric, alpha in (("frobenius", 1.0), *((m, a) for m in ("attention", "fisher") for a in (0.5, 0.75, 1.0))):
            words = metric if metric == "frobenius" else f"{metric}^{alpha:g}"
            yield from self._at("metric", (words,), replace(PLAIN, metric=metric, alpha=alpha))

    def text(self) -> Iterator[Case]:
        """Yield codecs with and without token prediction, in both metrics."""
        for metric in ("frobenius", "fisher"):
            for text in (False, True):
                settings = EigenSettings(metric=metric, text=text)
                yield from self._at("text", (metric, "predicted" if text else "not predicted"), settings)

    def block(self) -> Iterator[Case]:
        """Yield codecs of different block sizes."""
        for text in (False, True):
            fitted = cache(partial(fit_eigen, self.source, EigenSettings(text=text)))
            for block in (16, 64, 128, 512):  # which decides the size alone
                words = (f"{block} tokens" + (", text" if text else ""),)
                yield from self._of(lambda f=fitted, b=block: _in_blocks(f(), b), "block", words)

    def kept(self) -> Iterator[Case]:
        """Yield codecs with different sinks and windows in 16 bits."""
        for sinks, window in ((0, 0), (1, 0), (4, 0), (16, 0), (4, 16), (4, 64)):
            settings = replace(PLAIN, sinks=sinks, window=window)
            yield from self._at("kept", (f"{sinks} sinks, window of {window}",), settings)

    def group(self) -> Iterator[Case]:
        """Yield groups of more and more layers."""
        for group in (1, 2, 3, 6):
            yield from self._at("group", (f"groups of {group}",), replace(PLAIN, group=group))

    def size(self) -> Iterator[Case]:
        """Yield all scopes, fitted on a fourth, on half and on all of the calibration tokens."""
        for tokens in (self.tokens // 4, self.tokens // 2, self.tokens):
            source = CalibrationSet(self.session, self.sequences(self.calibration, tokens))
            for scope in ("layer", "groups", "joint"):
                yield from self._at("size", (f"{tokens:,} tokens", scope), replace(PLAIN, scope=scope), source)

    def domain(self) -> Iterator[Case]:
        """Yield codecs fitted on different domains."""
        for text in (self.calibration, *([self.other] if self.other else [])):
            source = CalibrationSet(self.session, self.sequences(text, self.tokens))
            name = Path(text).name
            yield from self._at("domain", (f"fitted on {name}",), PLAIN, source)
            yield from self._at("domain", (f"fitted on {name}, text",), EigenSettings(), source)

    def _at(
        self, part: str, words: tuple[str, ...], settings: EigenSettings, source: CalibrationSet | None = None
    ) -> Iterator[Case]:
        yield from self._of(cache(partial(fit_eigen, source or self.source, settings)), part, words)

    def _of(self, fitted: Callable[[], EigenFit], part: str, words: tuple[str, ...]) -> Iterator[Case]:
        context = self.length - SCORED
        for rate in self.rates:
            yield Case(
                part, words, rate, lambda rate=rate: at_bits(fitted(), rate, context=context, tolerance=TOLERANCE).codec
            )


def _in_blocks(fit: EigenFit, block: int) -> EigenFit:
    return replace(fit, settings=replace(fit.settings, block=block))


class Scorer:
    """Scores rows one by one. Prefixes are read once.

    Args:
        session: The model.
        text: The scored text.
    """

    def __init__(self, session: Session, text: Sequences) -> None:
        self.session, self.text = session, text
        self.prefixes = KeptPrefixes(session.memory // 4)
        self.protocol = ReadingProtocol(kind="prefix", length=text.corpus.max_length - SCORED)

    def figure(self, case: Case, row: dict) -> dict:
        """Return the row with the quality of its codec, and its bits per value without and with side information."""
        codec = case.fitted()
        scores = score_codecs(
            self.session,
            self.text,
            {"codec": codec},
            self.protocol,
            calibration=self.text.corpus,
            read_first=self.prefixes,
        )
        quality = scores.quality["codec"]
        values = AMORTIZED * self.session.loaded.geometry.values_per_token
        bits = 16 / quality.compression_ratio
        return row | {"bits": bits, "stored_bits": bits + 8 * codec.nbytes / values, "quality": quality.model_dump()}


def tables_of(figures: list[dict]) -> Iterator[Table]:
    """Yield one table per model, part and text, with one row per case and a group of columns per rate."""
    for model, part, text in dict.fromkeys((f["model"], f["part"], f["text"]) for f in figures):
        selected = [f for f in figures if (f["model"], f["part"], f["text"]) == (model, part, text)]
        rates = sorted({f["rate"] for f in selected})
        columns = ["Row", *(f"{name} at {rate:g}" for rate in rates for name in COLUMNS)]
        rows = []
        for words in dict.fromkeys(tuple(f["words"]) for f in selected):
            cells = [", ".join(words)]
            for rate in rates:
                figure = next((f for f in selected if tuple(f["words"]) == words and f["rate"] == rate), None)
                if figure is None:
                    cells += ["—"] * len(COLUMNS)
                    continue
                quality = Quality(**figure["quality"])
                cells += [
                    f"{figure['bits']:.3f}",
                    f"{figure['stored_bits']:.3f}",
                    interval_cell(quality),
                    f"{quality.kl:.4f}",
                ]
            rows.append(tuple(cells))
        yield Table(f"{model}: {TITLES[part]}; scored on {text}", tuple(columns), tuple(rows))


def main() -> None:
    """Run the ablations, print their tables and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ref-llama"], help="models; default: ref-llama")
    parser.add_argument("--parts", default=",".join(TITLES), help="parts to measure; default: all")
    parser.add_argument("--rates", default="0.25,0.5", help="bits per value; default: 0.25,0.5")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="calibration tokens; default: 65536")
    parser.add_argument("--calibration-text", default="stdlib", help="calibration text; default: stdlib")
    parser.add_argument("--length", type=int, default=512, help="tokens of a scored sequence; default: 512")
    parser.add_argument("--text", default="stdlib:held-out", help="scored text; default: stdlib:held-out")
    parser.add_argument("--other", help="calibration text of another domain")
    parser.add_argument("--other-held-out", help="held-out text of the domain of --other, scored by the part `domain`")
    parser.add_argument("--tokens", type=int, default=24_576, help="scored tokens; default: 24576")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument(
        "--output", type=Path, help="JSON file of the figures, written after every row; rows in it are not measured again"
    )
    parser.add_argument("--read", type=Path, nargs="+", help="print the tables of such JSON files without measuring")
    arguments = parser.parse_args()
    console = Console()

    def show(figures: list[dict]) -> None:
        for table in tables_of(figures):
            print(table.markdown()) if arguments.markdown else console.print(table)

    if arguments.read:
        show([figure for path in arguments.read for figure in json.loads(path.read_text())])
        return
    rates, output = tuple(map(float, arguments.rates.split(","))), arguments.output
    figures = json.loads(output.read_text()) if output and output.exists() else []
    for name in arguments.models:
        ablations = Ablations(
            load(name), arguments.calibration_text, arguments.other, arguments.calibration_tokens, rates, arguments.length
        )
        for part in arguments.parts.split(","):
            others = [arguments.other_held_out] if part == "domain" and arguments.other_held_out else []
            for text in [arguments.text, *others]:
                scorer = Scorer(ablations.session, ablations.sequences(text, arguments.tokens, arguments.length))
                for case in ablations.cases([part]):
                    row = case.row(ablations.loaded.name, scorer.text.corpus.name)
                    if any(row.items() <= figure.items() for figure in figures):
                        continue
                    try:
                        figures.append(scorer.figure(case, row))
                    except BudgetError as error:
                        print(f"{part}, {', '.join(case.words)}: no row. {error}", file=sys.stderr)
                        continue
                    print(f"{part}, {', '.join(case.words)}: measured", file=sys.stderr)
                    if output:
                        output.write_text(json.dumps(figures, indent=1))
    show(figures)


if __name__ == "__main__":
    main()
