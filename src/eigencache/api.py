"""The public Python API: `probe(model, tokenizer, text)` gives an object whose statistics are attributes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigencache.corpora.sequences import pack
from eigencache.corpora.text import Document, Text, read_text
from eigencache.errors import LayerError
from eigencache.geometry import geometry_from_config
from eigencache.models.load import LoadedModel, check_tokenizer, load, load_tokenizer, with_evidence
from eigencache.records import ProbeRecord, Spectrum
from eigencache.studies.gather import Progress
from eigencache.studies.probe import ProbeSettings, default_length, probe_model

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEXT = "stdlib"
DEFAULT_TOKENS = 131_072


def probe(
    model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    text: str | Iterable[str] = DEFAULT_TEXT,
    *,
    tokens: int | None = DEFAULT_TOKENS,
    max_length: int | None = None,
    settings: ProbeSettings | None = None,
    on_progress: Progress | None = None,
) -> Probe:
    """Probe the KV cache of `model` on `text`; the model's weights and hooks are as before afterwards.

    `model`: a name or folder, or a model already loaded in any way `from_pretrained` offers (then `tokenizer` is
    needed). `text`: a spec as on the command line (`stdlib`, a file, `hf:…`), or the documents themselves.
    `tokens`: how many to use at most, None for all. `max_length`: tokens per sequence, by default 512 or what the
    model has positions for. Raises the errors of `eigencache.errors`.
    """
    loaded = _loaded(model, tokenizer)
    source = read_text(text) if isinstance(text, str) else _documents(text)
    sequences = pack(source, loaded.tokenizer, tokens=tokens, max_length=max_length or default_length(loaded))
    extra = {} if on_progress is None else {"on_progress": on_progress}
    return Probe(probe_model(loaded, sequences, settings, **extra))


def _loaded(model: Any, tokenizer: Any) -> LoadedModel:
    if isinstance(model, str):
        if tokenizer is None or isinstance(tokenizer, str):
            return load(model, tokenizer=tokenizer)
        loaded = load(model)
        model = loaded.model
    if tokenizer is None:
        raise TypeError("a model object needs its tokenizer: probe(model, tokenizer, text)")
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    check_tokenizer(tokenizer, model)
    name = Path(model.config.name_or_path).name or type(model).__name__
    return LoadedModel(name, model.eval(), tokenizer, with_evidence(geometry_from_config(model.config), model))


def _documents(texts: Iterable[str]) -> Text:
    documents = [Document(f"document {index}", text) for index, text in enumerate(texts)]
    return Text.scan("documents passed from Python", lambda: documents)


@dataclass(frozen=True)
class LayerView:
    """The spectra of one layer by tensor name: `.values`, `.keys_pre_rope`, `.keys_post_rope`, `.latent`, …

    `.keys` is the frame before rotation where both exist. Centred, heads of the layer concatenated; `head(i)` and
    `uncentred` choose otherwise.
    """

    record: ProbeRecord
    layer_idx: int | None
    head_idx: int | None = None
    centred: bool = True

    def head(self, head: int) -> LayerView:
        """The same of one KV head."""
        return LayerView(self.record, self.layer_idx, head, self.centred)

    @property
    def uncentred(self) -> LayerView:
        """The same about zero instead of about the mean."""
        return LayerView(self.record, self.layer_idx, self.head_idx, False)

    def __getattr__(self, name: str) -> Spectrum:
        if name.startswith("_"):
            raise AttributeError(name)
        scope = "all" if self.layer_idx is None else "layer" if self.head_idx is None else "head"
        for wanted in (name, f"{name}_pre_rope", f"{name}_post_rope"):
            if found := self.record.select(wanted, scope, self.layer_idx, self.head_idx, self.centred):
                return found[0]
        raise AttributeError(f"no {name} at scope {scope}; captured: {', '.join(self.record.names)}")


@dataclass(frozen=True)
class Probe:
    """A finished probe: statistics by layer, plots, tables, JSON. `record` holds everything that was measured."""

    record: ProbeRecord

    def layer(self, layer_idx: int) -> LayerView:
        """One layer's spectra. Raises `LayerError` for a layer that was not probed."""
        probed = sorted({s.layer_idx for s in self.record.spectra if s.layer_idx is not None})
        if layer_idx not in probed:
            raise LayerError(f"layer {layer_idx} was not probed; probed layers: {', '.join(map(str, probed))}")
        return LayerView(self.record, layer_idx)

    @property
    def all_layers(self) -> LayerView:
        """The spectra over all layers concatenated."""
        return LayerView(self.record, None)

    @property
    def warnings(self) -> list[str]:
        """What the data could not support."""
        return self.record.warnings

    def plot(self) -> Figure:
        """Spectra and energy curves as a matplotlib figure."""
        from eigencache.report.plots import plot_probe

        return plot_probe(self.record)

    def to_pandas(self) -> pd.DataFrame:
        """One row per spectrum; eigenvalues and energy curves are left in `record`."""
        import pandas as pd

        left_out = {"eigenvalues", "null_eigenvalues", "energy", "held_out_energy", "intervals", "refusals", "warnings"}
        return pd.DataFrame([spectrum.model_dump(exclude=left_out) for spectrum in self.record.spectra])

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, whole or not at all."""
        self.record.save(path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` or `eigencache probe --output` wrote."""
        return cls(ProbeRecord.load(path))

    def _repr_html_(self) -> str:
        from eigencache.report.tables import probe_table

        return probe_table(self.record).html()
