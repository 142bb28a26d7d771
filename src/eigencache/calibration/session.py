"""A model and how it is run, as every study, fit and score takes it."""

from dataclasses import dataclass, replace

from eigencache.corpora.sequences import Sequences
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import require_steady
from eigencache.progress import Progress, silent

MEMORY = 4 * 2**30  # default, in bytes


@dataclass(frozen=True)
class Session:
    """A model with the settings of every run of it.

    Args:
        loaded: the model, in eval mode, with its tokenizer and geometry.
        batch_size: sequences per forward pass.
        seed: seed of everything random.
        on_progress: called with the name of the work, the units done and the total of units.
        memory: bytes that the work may take beside the model.
    """

    loaded: LoadedModel
    batch_size: int = 8
    seed: int = 0
    on_progress: Progress = silent
    memory: int = MEMORY

    def require_steady(self, sequences: Sequences) -> None:
        """Raise `StatisticsError` for sequences so long that the model changes the frequencies of its rotation."""
        require_steady(self.loaded, max(map(len, sequences.ids), default=0))

    def reporting(self, on_progress: Progress) -> "Session":
        """Return this session with another `on_progress`."""
        return replace(self, on_progress=on_progress)

    def named(self, prefix: str) -> "Session":
        """Return this session with `prefix: ` before the names in its progress reports."""
        return self.reporting(lambda what, done, of: self.on_progress(f"{prefix}: {what}", done, of))
