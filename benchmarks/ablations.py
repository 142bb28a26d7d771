"""What each part of `eigen` is worth, on one model: the tables of docs/ablations.md.

python benchmarks/ablations.py ref-llama --parts basis,text,block,kept,prediction,size,domain --output ablations.json

At equal bytes: every row has the same bits per value, everything counted, unless it says otherwise. ΔNLL and KL are those of
the scored text behind a prefix that is held encoded; nothing is fitted on it. Text is not predicted but where a row says so.
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
from layer_prediction import fit_layer_prediction

PLAIN = EigenSettings(text=False)
LENGTH, SCORED = 512, 128


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a codec, and the words that stand before its figures."""

    part: str
    words: tuple[str, ...]
    rate: float  # bits per value that were asked for
    codec: Codec


class Ablations:
    """One model and its calibration text; `rates`: bits per value at which rows are compared."""

    def __init__(self, loaded: LoadedModel, text: str, other: str | None, tokens: int, rates: tuple[float, ...]) -> None:
        self.loaded, self.other, self.tokens, self.rates = loaded, other, tokens, rates
        self.source = CalibrationSet(Session(loaded), self.sequences(text, tokens))

    def sequences(self, text: str, tokens: int) -> Sequences:
        """A text in sequences of 512 tokens."""
        return pack(read_text(text), self.loaded.tokenizer, tokens=tokens, max_length=LENGTH)

    def cases(self, parts: list[str]) -> Iterator[Case]:
        """The rows of the parts, by name."""
        for part in parts:
            yield from getattr(self, part)()

    def basis(self) -> Iterator[Case]:
        """Scope x metric x alpha."""
        metrics = [("frobenius", 1.0), *((m, a) for m in ("attention", "fisher") for a in (0.5, 0.75, 1.0))]
        for scope in ("head", "layer", "kind", "joint"):
            for metric, alpha in metrics:
                settings = replace(PLAIN, scope=scope, metric=metric, alpha=alpha)
                words = (scope, metric if metric == "frobenius" else f"{metric}^{alpha:g}")
                yield from self._at("basis", words, settings)

    def text(self) -> Iterator[Case]:
        """Prediction from the text, with both metrics."""
        for metric in ("frobenius", "fisher"):
            for text in (False, True):
                settings = EigenSettings(metric=metric, text=text)
                yield from self._at("text", (metric, "predicted" if text else "not predicted"), settings)

    def block(self) -> Iterator[Case]:
        """Tokens that decode together."""
        for block in (16, 32, 64, 128, 384):
            yield from self._at("block", (f"{block} tokens",), replace(PLAIN, block=block))
            yield from self._at("block", (f"{block} tokens, text",), EigenSettings(block=block))

    def kept(self) -> Iterator[Case]:
        """Sinks and window in 8 bits."""
        for sinks, window in ((0, 0), (1, 0), (4, 0), (0, 4), (0, 16), (4, 16)):
            settings = replace(PLAIN, sinks=sinks, window=window)
            yield from self._at("kept", (f"{sinks} sinks, window of {window}",), settings)

    def prediction(self) -> Iterator[Case]:
        """Layer l from layer l - 1 against the joint transform; the former's size is ideal."""
        for scope in ("layer", "joint"):
            yield from self._at("prediction", (scope,), replace(PLAIN, scope=scope))
        joint = fit_eigen(self.source, PLAIN)
        for rate in self.rates:
            step = at_bits(joint, rate).codec.step
            for factor in (0.5, 0.71, 1.0):
                yield Case(
                    "prediction", (f"layer from layer, step x {factor:g} of {rate:g}",), self._predicted(step * factor)
                )

    def _predicted(self, step: float) -> Codec:
        return fit_layer_prediction(self.source, PLAIN, step)

    def size(self) -> Iterator[Case]:
        """Calibration tokens."""
        for tokens in (8192, 16_384, 32_768, 65_536, 131_072):
            source = CalibrationSet(self.session, self.sequences("stdlib", tokens))
            yield from self._at("size", (f"{tokens:,} tokens",), PLAIN, source)
            yield from self._at("size", (f"{tokens:,} tokens, text",), EigenSettings(), source)

    def domain(self) -> Iterator[Case]:
        """Fitted on one domain, tested on another."""
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
    """Every case with its bits per value and its quality."""
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
    """A table per model, part and text: one row per case, a group of columns per rate."""
    for model, part, text in dict.fromkeys((f["model"], f["part"], f["text"]) for f in figures):
        own = [f for f in figures if (f["model"], f["part"], f["text"]) == (model, part, text)]
        rates = sorted({f["rate"] for f in own})
        columns = ["Row", *(f"{name} at {rate:g}" for rate in rates for name in ("Bits", "ΔNLL", "KL"))]
        rows = []
        for words in dict.fromkeys(tuple(f["words"]) for f in own):
            cells = [", ".join(words)]
            for rate in rates:
                found = next((f for f in own if tuple(f["words"]) == words and f["rate"] == rate), None)
                quality = Quality(**found["quality"]) if found else None
                cells += (
                    [f"{found['bits']:.3f}", interval_cell(quality), f"{quality.kl:.4f}"] if found and quality else ["—"] * 3
                )
            rows.append(tuple(cells))
        said = (getattr(Ablations, part).__doc__ or part).rstrip(".")
        yield Table(f"{model}: {said}; scored on {text}", tuple(columns), tuple(rows))


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["ref-llama"])
    parser.add_argument("--parts", default="basis,text,block,kept,prediction,size,domain")
    parser.add_argument("--rates", default="0.25,0.5")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--text", default="stdlib:held-out")
    parser.add_argument("--other", help="a text of another domain, to fit on", default=None)
    parser.add_argument("--other-held-out", help="text of that domain to score, apart from the former", default=None)
    parser.add_argument("--tokens", type=int, default=24_576, help="scored sequences hold so many tokens")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--output", type=Path, help="write all figures as JSON, part by part")
    parser.add_argument("--read", type=Path, nargs="+", help="print the tables of such JSON, and measure nothing")
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
            found = [
                row
                for text in [arguments.text, *others]
                for row in scored(ablations.loaded, cases, ablations.sequences(text, arguments.tokens))
            ]
            show(found)
            figures += found
            if arguments.output:
                arguments.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
