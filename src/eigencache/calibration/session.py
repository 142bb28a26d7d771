"""A model and how it is run, as every study, fit and score takes it."""

from dataclasses import dataclass, replace

from eigencache.corpora.sequences import Sequences
from eigencache.errors import ModelError, TokenizerMismatchError
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

    def require_readable(self, sequences: Sequences) -> None:
        """Check that the model has an embedding of every token id and, if it learned its positions, enough of them.

        Raises:
            TokenizerMismatchError: The model has no embedding of a token id.
            ModelError: A sequence is longer than the learned positions.
        """
        loaded, largest_id = self.loaded, max((int(ids.max()) for ids in sequences.ids), default=0)
        if largest_id >= loaded.embedded_ids:
            raise TokenizerMismatchError(
                f"{loaded.name}: token id {largest_id} is too large: the model embeds only {loaded.embedded_ids} ids. "
                "Use its own tokenizer."
            )
        positions, longest = loaded.learned_positions, sequences.corpus.max_length
        if positions and longest > positions:
            raise ModelError(
                f"{loaded.name} has {positions} positions, the sequences {longest} tokens. Use `max_length` ≤ {positions}."
            )

    def require_steady(self, sequences: Sequences) -> None:
        """Check what `require_readable` checks, and that all sequences are rotated by the same frequencies.

        Raises:
            StatisticsError: Sequences so long that the model changes the frequencies of its rotation.
        """
        self.require_readable(sequences)
        require_steady(self.loaded, max(map(len, sequences.ids), default=0))

    def reporting(self, on_progress: Progress) -> "Session":
        """Return this session with another `on_progress`."""
        return replace(self, on_progress=on_progress)

    def named(self, prefix: str) -> "Session":
        """Return this session with `prefix: ` before the names in its progress reports."""
        return self.reporting(lambda what, done, of: self.on_progress(f"{prefix}: {what}", done, of))
