"""One model and how it is run: what every study, fit and score needs besides its text."""

from dataclasses import dataclass, replace

from eigencache.corpora.sequences import Sequences
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import require_steady
from eigencache.progress import Progress, silent

MEMORY = 4 * 2**30  # bytes


@dataclass(frozen=True)
class Session:
    """A model with the settings of every run of it.

    Args:
        loaded: the model, in eval mode, with its tokenizer and geometry.
        batch_size: sequences per forward pass.
        seed: seed of everything random.
        on_progress: called with the name of the work, the units done and the units in all.
        memory: bytes that moments and sampled vectors may take.
    """

    loaded: LoadedModel
    batch_size: int = 8
    seed: int = 0
    on_progress: Progress = silent
    memory: int = MEMORY

    def require_steady(self, sequences: Sequences) -> None:
        """Raises `StatisticsError` for sequences so long that the model rotates their keys with other frequencies."""
        require_steady(self.loaded, max(map(len, sequences.ids), default=0))

    def reporting(self, on_progress: Progress) -> "Session":
        """Return the same session with another receiver of its progress."""
        return replace(self, on_progress=on_progress)

    def named(self, prefix: str) -> "Session":
        """Return the same session whose progress is reported as `prefix: what`."""
        return self.reporting(lambda what, done, of: self.on_progress(f"{prefix}: {what}", done, of))
