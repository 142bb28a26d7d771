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

import torch
from rich.console import Console

from eigencache.codec.base import Codec
from eigencache.corpora.sequences import Sequences, pack
from eigencache.corpora.text import read_text
from eigencache.errors import BudgetError
from eigencache.models.load import LoadedModel, load
from eigencache.quality import Protocol
from eigencache.report.sweeps import interval_cell
from eigencache.report.table import Table
from eigencache.studies.eigen_fit import EigenSettings, fit_eigen
from eigencache.studies.eigen_targets import at_bits
from eigencache.studies.scoring import score_codecs
from eigencache.studies.source import Source
from layer_prediction import fit_layer_prediction

PLAIN = EigenSettings(text=False)
LENGTH, SCORED = 512, 128


@dataclass(frozen=True, eq=False)
class Case:
    """One row: a codec, and the words that stand before its figures."""

    part: str
    words: tuple[str, ...]
    codec: Codec


class Ablations:
    """One model and its calibration text; `rates`: bits per value at which rows are compared."""

    def __init__(self, loaded: LoadedModel, text: str, other: str | None, tokens: int, rates: tuple[float, ...]) -> None:
        self.loaded, self.other, self.tokens, self.rates = loaded, other, tokens, rates
        self.source = Source(loaded, self.sequences(text, tokens))

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
        joint = fit_eigen(self.loaded, self.source.sequences, PLAIN, source=self.source)
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
            source = Source(self.loaded, self.sequences("stdlib", tokens))
            yield from self._at("size", (f"{tokens:,} tokens",), PLAIN, source)
            yield from self._at("size", (f"{tokens:,} tokens, text",), EigenSettings(), source)

    def domain(self) -> Iterator[Case]:
        """Fitted on one domain, tested on another."""
        for text in ("stdlib", *([self.other] if self.other else [])):
            source = Source(self.loaded, self.sequences(text, self.tokens))
            name = Path(text).name
            yield from self._at("domain", (f"fitted on {name}",), PLAIN, source)
            yield from self._at("domain", (f"fitted on {name}, text",), EigenSettings(), source)

    def _at(
        self, part: str, words: tuple[str, ...], settings: EigenSettings, source: Source | None = None
    ) -> Iterator[Case]:
        source = source or self.source
        fit = fit_eigen(self.loaded, source.sequences, settings, source=source)
        for rate in self.rates:
            try:
                yield Case(part, words, at_bits(fit, rate, context=LENGTH - SCORED).codec)
            except BudgetError:
                continue


def scored(loaded: LoadedModel, cases: list[Case], text: Sequences) -> list[tuple[Case, float, object]]:
    """Every case with its bits per value and its quality."""
    codecs = {f"{index}": case.codec for index, case in enumerate(cases)}
    scores = score_codecs(loaded, text, codecs, Protocol(kind="prefix", length=LENGTH - SCORED), calibration=text.corpus)
    return [(case, 16 / scores.quality[f"{i}"].compression_ratio, scores.quality[f"{i}"]) for i, case in enumerate(cases)]


def table(model: str, part: str, rows: list, doc: str) -> Table:
    """One part: words, bits, loss, KL; rows of one rate beside each other."""
    columns = ("Row", "Bits per value", "ΔNLL (nats)", "KL (nats)", "Top-1")
    cells = tuple(
        (
            ", ".join(case.words),
            f"{bits:.3f}",
            interval_cell(quality),
            f"{quality.kl:.4f}",
            f"{100 * quality.top1_agreement:.1f} %",
        )
        for case, bits, quality in rows
    )
    return Table(f"{model}: {doc.rstrip('.')}", columns, cells)


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
    parser.add_argument("--markdown", type=Path, help="append the tables here")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    parts, rates = arguments.parts.split(","), tuple(map(float, arguments.rates.split(",")))
    console, figures = Console(), []
    torch.set_grad_enabled(False)
    for name in arguments.models:
        loaded = load(name)
        ablations = Ablations(loaded, "stdlib", arguments.other, arguments.calibration_tokens, rates)
        for part in parts:
            with torch.enable_grad():
                cases = list(ablations.cases([part]))
            others = [arguments.other_held_out] if part == "domain" and arguments.other_held_out else []
            for text in [arguments.text, *others]:
                rows = scored(loaded, cases, ablations.sequences(text, arguments.tokens))
                said = (getattr(Ablations, part).__doc__ or part).rstrip(".")
                found = table(loaded.name, part, rows, said + (f", scored on {Path(text).name}" if part == "domain" else ""))
                console.print(found)
                if arguments.markdown:
                    with arguments.markdown.open("a") as file:
                        file.write(found.markdown() + "\n")
                figures += [
                    {"model": name, "part": part, "text": text, "words": case.words, "bits": bits} | q.model_dump()
                    for case, bits, q in rows
                ]
                if arguments.output:
                    arguments.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
