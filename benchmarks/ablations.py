"""Ablations of the `eigen` codec on one model: the tables of docs/ablations.md.

    python benchmarks/ablations.py ref-llama --parts basis,text,block,kept,prediction,size,domain --output ablations.json

Rows are compared at equal bits per value, with all bytes counted, unless a row says otherwise. ΔNLL and KL are measured on
held-out text after an encoded prefix. Token prediction is off unless a row names it.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.base import Codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.errors import BudgetError
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.fitting.eigen import EigenSettings, fit_eigen
from eigencache.fitting.eigen_search import at_bits
from eigencache.models.load import LoadedModel, load
from eigencache.records.quality import Quality, ReadingProtocol
from eigencache.report.core.table import Table
from eigencache.report.quality.sweep_table import interval_cell

PLAIN = EigenSettings(text=False)
LENGTH, SCORED = 512, 128
TITLES = {
    "basis": "Scope × metric × alpha",
    "text": "Token prediction, with both metrics",
    "block": "Block size",
    "kept": "Sinks and window in 8 bits",
    "prediction": "Groups of layers, each predicted from the group before, against all layers at once",
    "size": "Calibration tokens",
    "domain": "Fitted on one domain, tested on another",
}


@dataclass(frozen=True, eq=False)
class Case:
    """One row of a table: a codec and its label."""

    part: str
    words: tuple[str, ...]
    rate: float  # requested bits per value
    codec: Codec


class Ablations:
    """The ablations of one model; each part is a method with the name of the part, and its title is in `TITLES`.

    Args:
        loaded: The model.
        text: Specification of the calibration text.
        other: Specification of a text of another domain; None: no such rows.
        tokens: Calibration tokens.
        rates: Bits per value at which rows are compared.
    """

    def __init__(self, loaded: LoadedModel, text: str, other: str | None, tokens: int, rates: tuple[float, ...]) -> None:
        self.loaded, self.other, self.tokens, self.rates = loaded, other, tokens, rates
        self.session = Session(loaded)
        self.source = CalibrationSet(self.session, self.sequences(text, tokens))

    def sequences(self, text: str, tokens: int) -> Sequences:
        """Return a text in sequences of 512 tokens."""
        return pack(read_text(text), self.loaded.tokenizer, tokens=tokens, max_length=LENGTH)

    def cases(self, parts: list[str]) -> Iterator[Case]:
        """Yield the rows of the named parts."""
        for part in parts:
            yield from getattr(self, part)()

    def basis(self) -> Iterator[Case]:
        """Yield all combinations of scope, metric and alpha."""
        metrics = [("frobenius", 1.0), *((m, a) for m in ("attention", "fisher") for a in (0.5, 0.75, 1.0))]
        for scope in ("head", "layer", "groups", "joint"):
            for metric, alpha in metrics:
                settings = replace(PLAIN, scope=scope, metric=metric, alpha=alpha)
                words = (scope, metric if metric == "frobenius" else f"{metric}^{alpha:g}")
                yield from self._at("basis", words, settings)

    def text(self) -> Iterator[Case]:
        """Yield codecs with and without token prediction, in both metrics."""
        for metric in ("frobenius", "fisher"):
            for text in (False, True):
                settings = EigenSettings(metric=metric, text=text)
                yield from self._at("text", (metric, "predicted" if text else "not predicted"), settings)

    def block(self) -> Iterator[Case]:
        """Yield codecs of different block sizes."""
        for block in (16, 32, 64, 128, 384):
            yield from self._at("block", (f"{block} tokens",), replace(PLAIN, block=block))
            yield from self._at("block", (f"{block} tokens, text",), EigenSettings(block=block))

    def kept(self) -> Iterator[Case]:
        """Yield codecs with different sinks and windows in 8 bits."""
        for sinks, window in ((0, 0), (1, 0), (4, 0), (0, 4), (0, 16), (4, 16)):
            settings = replace(PLAIN, sinks=sinks, window=window)
            yield from self._at("kept", (f"{sinks} sinks, window of {window}",), settings)

    def prediction(self) -> Iterator[Case]:
        """Yield groups of more and more layers, layers without prediction, and the joint transform."""
        for group in (1, 2, 3, 6):
            words = (f"groups of {group}",)
            yield from self._at("prediction", words, replace(PLAIN, scope="groups", group=group))
        for scope in ("layer", "joint"):
            yield from self._at("prediction", (scope,), replace(PLAIN, scope=scope))

    def size(self) -> Iterator[Case]:
        """Yield codecs fitted on different numbers of tokens."""
        for tokens in (8192, 16_384, 32_768, 65_536, 131_072):
            source = CalibrationSet(self.session, self.sequences("stdlib", tokens))
            yield from self._at("size", (f"{tokens:,} tokens",), PLAIN, source)
            yield from self._at("size", (f"{tokens:,} tokens, text",), EigenSettings(), source)

    def domain(self) -> Iterator[Case]:
        """Yield codecs fitted on different domains."""
        for text in ("stdlib", *([self.other] if self.other else [])):
            source = CalibrationSet(self.session, self.sequences(text, self.tokens))
            name = Path(text).name
            yield from self._at("domain", (f"fitted on {name}",), PLAIN, source)
            yield from self._at("domain", (f"fitted on {name}, text",), EigenSettings(), source)

    def _at(
        self, part: str, words: tuple[str, ...], settings: EigenSettings, source: CalibrationSet | None = None
    ) -> Iterator[Case]:
        source = source or self.source
        fit = fit_eigen(source, settings)
        for rate in self.rates:
            try:
                yield Case(part, words, rate, at_bits(fit, rate, context=LENGTH - SCORED).codec)
            except BudgetError:
                continue


def scored(loaded: LoadedModel, cases: list[Case], text: Sequences) -> list[dict]:
    """Return bits per value and quality of every case, as rows for JSON.

    Args:
        loaded: The model.
        cases: The rows.
        text: The scored text.
    """
    codecs = {f"{index}": case.codec for index, case in enumerate(cases)}
    scores = score_codecs(
        Session(loaded), text, codecs, ReadingProtocol(kind="prefix", length=LENGTH - SCORED), calibration=text.corpus
    )
    rows = []
    for index, case in enumerate(cases):
        quality = scores.quality[f"{index}"]
        about = {"part": case.part, "words": case.words, "rate": case.rate, "bits": 16 / quality.compression_ratio}
        rows.append(about | {"model": loaded.name, "text": text.corpus.name, "quality": quality.model_dump()})
    return rows


def tables_of(figures: list[dict]) -> Iterator[Table]:
    """Yield one table per model, part and text, with one row per case and a group of columns per rate."""
    for model, part, text in dict.fromkeys((f["model"], f["part"], f["text"]) for f in figures):
        selected = [f for f in figures if (f["model"], f["part"], f["text"]) == (model, part, text)]
        rates = sorted({f["rate"] for f in selected})
        columns = ["Row", *(f"{name} at {rate:g}" for rate in rates for name in ("Bits", "ΔNLL", "KL"))]
        rows = []
        for words in dict.fromkeys(tuple(f["words"]) for f in selected):
            cells = [", ".join(words)]
            for rate in rates:
                figure = next((f for f in selected if tuple(f["words"]) == words and f["rate"] == rate), None)
                if figure is None:
                    cells += ["—"] * 3
                    continue
                quality = Quality(**figure["quality"])
                cells += [f"{figure['bits']:.3f}", interval_cell(quality), f"{quality.kl:.4f}"]
            rows.append(tuple(cells))
        yield Table(f"{model}: {TITLES[part]}; scored on {text}", tuple(columns), tuple(rows))


def main() -> None:
    """Run the ablations, print their tables and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ref-llama"], help="models; default: ref-llama")
    parser.add_argument("--parts", default=",".join(TITLES), help="parts to measure; default: all")
    parser.add_argument("--rates", default="0.25,0.5", help="bits per value; default: 0.25,0.5")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="calibration tokens; default: 65536")
    parser.add_argument("--text", default="stdlib:held-out", help="scored text; default: stdlib:held-out")
    parser.add_argument("--other", help="calibration text of another domain")
    parser.add_argument("--other-held-out", help="held-out text of the domain of --other, scored by the part `domain`")
    parser.add_argument("--tokens", type=int, default=24_576, help="scored tokens; default: 24576")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--output", type=Path, help="JSON file of the figures, written after every part")
    parser.add_argument("--read", type=Path, nargs="+", help="print the tables of such JSON files without measuring")
    arguments = parser.parse_args()
    console = Console()

    def show(figures: list[dict]) -> None:
        for table in tables_of(figures):
            print(table.markdown()) if arguments.markdown else console.print(table)

    if arguments.read:
        show([figure for path in arguments.read for figure in json.loads(path.read_text())])
        return
    rates, figures = tuple(map(float, arguments.rates.split(","))), []
    for name in arguments.models:
        ablations = Ablations(load(name), "stdlib", arguments.other, arguments.calibration_tokens, rates)
        for part in arguments.parts.split(","):
            cases = list(ablations.cases([part]))
            others = [arguments.other_held_out] if part == "domain" and arguments.other_held_out else []
            rows = [
                row
                for text in [arguments.text, *others]
                for row in scored(ablations.loaded, cases, ablations.sequences(text, arguments.tokens))
            ]
            show(rows)
            figures += rows
            if arguments.output:
                arguments.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
