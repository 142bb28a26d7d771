"""Load, read and probe with progress bars: what `probe`, `report` and the historic entry points do alike."""

from eigencache.cli.progress import progress_bar
from eigencache.corpora.sequences import Sequences, pack
from eigencache.corpora.text import read_text
from eigencache.models.load import LoadedModel, load
from eigencache.records import ProbeRecord
from eigencache.studies.probe import ProbeSettings, default_length, probe_model


def load_with_text(
    model: str,
    *,
    text: str,
    tokens: int,
    max_length: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[LoadedModel, Sequences]:
    """A model and the sequences of a text in its tokens."""
    source = read_text(text)
    loaded = load(model, device=device, dtype=dtype, tokenizer=tokenizer)
    with progress_bar(model) as on_progress:
        sequences = pack(
            source,
            loaded.tokenizer,
            tokens=tokens,
            max_length=max_length or default_length(loaded),
            on_progress=lambda done, of: on_progress("tokenising", done, of or done),
        )
    return loaded, sequences


def measure_model(model: str, settings: ProbeSettings, **options: object) -> ProbeRecord:
    """Probe one model by its spec; the options are those of `load_with_text`."""
    loaded, sequences = load_with_text(model, **options)  # type: ignore[arg-type]
    with progress_bar(model) as on_progress:
        return probe_model(loaded, sequences, settings, on_progress)
