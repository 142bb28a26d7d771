"""A finished probe for Python users: statistics as attributes, a plot, and a pandas data frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eigencache.errors import LayerError
from eigencache.records.probe import ProbeRecord, Spectrum

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerView:
    """The spectra of one layer by tensor name: `.values`, `.keys_pre_rope`, `.keys_post_rope`, `.latent`.

    `.keys` are the keys before rotation where both frames exist. Spectra are about the mean, with the heads of the layer
    concatenated; `head(i)` selects one head, `uncentered` the spectra about zero.
    """

    record: ProbeRecord
    layer_idx: int | None
    head_idx: int | None = None
    centered: bool = True

    def head(self, head: int) -> LayerView:
        """Return the spectra of one KV head. Raises `LayerError` for a head that was not probed."""
        probed = sorted({s.head for s in self.record.spectra if s.head is not None and s.layer_idx == self.layer_idx})
        if head not in probed:
            where = "over all layers" if self.layer_idx is None else f"of layer {self.layer_idx}"
            raise LayerError(f"head {head} {where} was not probed; probed heads: {', '.join(map(str, probed)) or 'none'}")
        return LayerView(self.record, self.layer_idx, head, self.centered)

    @property
    def uncentered(self) -> LayerView:
        """The spectra about zero instead of about the mean."""
        return LayerView(self.record, self.layer_idx, self.head_idx, False)

    def __getattr__(self, name: str) -> Spectrum:
        if name.startswith("_"):
            raise AttributeError(name)
        scope = "all" if self.layer_idx is None else "layer" if self.head_idx is None else "head"
        for wanted in (name, f"{name}_pre_rope", f"{name}_post_rope"):
            if found := self.record.select(wanted, scope, self.layer_idx, self.head_idx, self.centered):
                return found[0]
        here = self.record.select(None, scope, self.layer_idx, self.head_idx, self.centered)
        there = ", ".join(dict.fromkeys(spectrum.name for spectrum in here)) or "nothing"
        raise AttributeError(f"no {name} at scope {scope}, where these were probed: {there}")


@dataclass(frozen=True)
class Probe:
    """A finished probe: statistics by layer, plots, tables, JSON. `record` holds everything that was measured."""

    record: ProbeRecord

    def layer(self, layer_idx: int) -> LayerView:
        """Return the spectra of one layer. Raises `LayerError` for a layer that was not probed."""
        probed = sorted({s.layer_idx for s in self.record.spectra if s.layer_idx is not None})
        if layer_idx not in probed:
            raise LayerError(f"layer {layer_idx} was not probed; probed layers: {', '.join(map(str, probed)) or 'none'}")
        return LayerView(self.record, layer_idx)

    @property
    def all_layers(self) -> LayerView:
        """The spectra over all layers concatenated."""
        return LayerView(self.record, None)

    @property
    def warnings(self) -> list[str]:
        """Warnings, one sentence each: on the text, the model, and statistics that the sample does not support."""
        return self.record.warnings

    def plot(self) -> Figure:
        """Return the spectra and energy curves as a matplotlib figure."""
        from eigencache.report.probe.plots import plot_probe

        return plot_probe(self.record)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per spectrum, without the lists of the record, such as eigenvalues.

        The column `dead` is the number of dimensions that never vary.
        """
        from eigencache.report.core.drawing import require

        require("pandas", "data frames")
        import pandas as pd

        left_out = {"eigenvalues", "null_eigenvalues", "energy", "held_out_energy", "intervals", "refusals", "warnings"}
        rows = [spectrum.model_dump(exclude=left_out) | {"dead": len(spectrum.dead)} for spectrum in self.record.spectra]
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, completely or not at all. Raises `OutputError` if the file cannot be written."""
        self.record.save(path)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` or `eigencache probe --output` wrote. Raises `RecordError` if the file is no probe."""
        return cls(ProbeRecord.load(path))

    def _repr_html_(self) -> str:
        from eigencache.report.probe.tables import probe_table

        return probe_table(self.record).html()
