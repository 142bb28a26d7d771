"""Load, read and probe with progress bars: what `probe`, `report` and the historic entry points do alike."""

from collections.abc import Callable

from eigencache.cli.progress import progress_bar
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.corpora.text import Text
from eigencache.models.load import LoadedModel, load
from eigencache.records.probe import ProbeRecord
from eigencache.studies.probe import ProbeSettings, probe_model


def load_with_text(
    model: str,
    *,
    text: str,
    tokens: int,
    max_length: int | None = None,
    length_of: Callable[[LoadedModel], int] = lambda loaded: loaded.default_length,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[LoadedModel, Sequences]:
    """A model and the sequences of a text in its tokens, of `max_length` or of what `length_of` says of the model."""
    source = read_text(text)
    loaded = load(model, device=device, dtype=dtype, tokenizer=tokenizer)
    return loaded, _packed(loaded, source, tokens, max_length or length_of(loaded))


def pack_with_progress(loaded: LoadedModel, text: str, tokens: int, max_length: int) -> Sequences:
    """The sequences of another text in the tokens of a model that is loaded."""
    return _packed(loaded, read_text(text), tokens, max_length)


def _packed(loaded: LoadedModel, source: Text, tokens: int, max_length: int) -> Sequences:
    with progress_bar(loaded.name) as on_progress:
        return pack(
            source,
            loaded.tokenizer,
            tokens=tokens,
            max_length=max_length,
            on_progress=lambda done, of: on_progress(f"tokenizing {source.name}", done, of or done),
        )


def measure_model(model: str, settings: ProbeSettings, **options: object) -> ProbeRecord:
    """Probe one model by its spec; the options are those of `load_with_text`."""
    loaded, sequences = load_with_text(model, **options)  # type: ignore[arg-type]
    with progress_bar(model) as on_progress:
        return probe_model(loaded, sequences, settings, on_progress)
