"""Name the commands that make the recommended codecs from the calibration text of a recommendation."""

import shlex
from dataclasses import dataclass
from typing import Self

from eigencache.fitting.live import SAFE
from eigencache.records.advice import Candidate, CodecFamily
from eigencache.records.quality import SweepRecord


@dataclass(frozen=True)
class Recipe:
    """Model, calibration text and options that the commands of all codecs of a recommendation share.

    Args:
        model: Model specification, as on the command line.
        text: Specification of the calibration text.
        tokens: Tokens of the calibration text at most.
        max_length: Tokens per calibration sequence.
        device: Device to load the model to. Default: that of the command line.
        dtype: Number format to load the model in. Default: that of the command line.
    """

    model: str
    text: str
    tokens: int
    max_length: int
    device: str | None = None
    dtype: str | None = None

    @classmethod
    def of_sweep(cls, record: SweepRecord) -> Self:
        """Return the recipe of the calibration text of a sweep, whose name may lack the folder of a file."""
        text = record.calibration
        return cls(record.model.name, text.name, text.tokens, text.max_length, dtype=record.model.dtype)

    def codec(self, family: CodecFamily, rate: float) -> str:
        """Return the command that fits a codec.

        Args:
            family: `eigen` or `live`.
            rate: Bits per value of `eigen`, or bits per packed value of `live`.
        """
        size: tuple[str, ...] = ("--bits", f"{rate:g}")
        if family == "live":
            size = ("--live-only", *(("--safe",) if rate == SAFE else ("--live-bits", f"{rate:g}")))
        words = ("fit", self.model, *size, "--text", self.text, "--tokens", str(self.tokens))
        return self._command(*words, "--max-length", str(self.max_length), "-o", self._folder(family))

    def pca(self, candidate: Candidate) -> str:
        """Return the command that saves a PCA codec; an empty string for an uncentered one, which no command makes."""
        if not candidate.centered:
            return ""
        frame = () if candidate.frame == "none" else ("--frame", candidate.frame)
        basis = ("--target", candidate.target, "--scope", candidate.scope, *frame, "--metric", candidate.metric)
        size = ("--bits", str(candidate.bits), "--ranks", str(candidate.rank))
        text = ("--calibration-text", self.text, "--calibration-tokens", str(self.tokens))
        short = ("--max-length", str(self.max_length), "--tokens", "4096", "--prompts", "0", "--tasks", "none")
        words = ("evaluate", self.model, *basis, *size, *text, *short)
        return self._command(*words, "--save-codec", self._folder("pca"))

    def with_command(self, candidate: Candidate) -> Candidate:
        """Return a PCA candidate with its command."""
        return candidate.model_copy(update={"command": self.pca(candidate)})

    def _folder(self, family: str) -> str:
        """Return the folder of a codec, such as `smollm2-eigen`."""
        return f"{self.model.rstrip('/').rpartition('/')[2].removesuffix('.gguf')}-{family}"

    def _command(self, *words: str) -> str:
        given = {"--device": self.device, "--dtype": self.dtype}
        return shlex.join(("eigencache", *words, *(word for flag, x in given.items() if x for word in (flag, x))))
