"""The Python API on a bundled model: five lines, attributes, and errors that say what exists."""

import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eigencache
from eigencache.errors import CorpusError, LayerError, ModelError
from eigencache.models.sources import bundled_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def probed() -> "eigencache.Probe":
    folder = bundled_path("ref-llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return eigencache.probe(model, tokenizer, "stdlib", tokens=8192, max_length=256)


def test_statistics_are_attributes_of_a_layer(probed) -> None:
    layer = probed.layer(3)
    assert 1 < layer.values.effective_rank <= 64
    assert layer.keys is layer.keys_pre_rope
    assert layer.keys_post_rope.frame == "post_rope"
    assert layer.head(1).values.scope == "head"
    assert not layer.uncentered.values.centered
    assert probed.all_layers.values.width == 7 * 64


def test_what_was_not_captured_is_named(probed) -> None:
    with pytest.raises(AttributeError, match="where these were probed: keys_pre_rope"):
        _ = probed.layer(3).latent
    with pytest.raises(LayerError, match="probed layers: 0, 1"):
        probed.layer(70)
    with pytest.raises(LayerError, match="head 99 of layer 3 was not probed; probed heads: 0, 1"):
        probed.layer(3).head(99)
    over_all = [spectrum for spectrum in probed.record.spectra if spectrum.scope == "all"]
    with pytest.raises(LayerError, match="layer 0 was not probed; probed layers: none"):
        eigencache.Probe(probed.record.model_copy(update={"spectra": over_all})).layer(0)


def test_a_data_frame_has_one_row_per_spectrum(probed) -> None:
    frame = probed.to_pandas()
    assert len(frame) == len(probed.record.spectra)
    assert {"layer_idx", "kind", "frame", "scope", "centered", "effective_rank", "support"} <= set(frame.columns)


def test_the_plot_is_a_figure_with_axes(probed) -> None:
    assert probed.plot().axes


def test_a_probe_is_saved_and_loaded(probed, tmp_path) -> None:
    probed.save(tmp_path / "p.json")
    assert eigencache.Probe.load(tmp_path / "p.json").record == probed.record


def test_documents_may_be_passed_as_strings() -> None:
    probe = eigencache.probe("ref-gpt2", text=["import os\n" * 300, "x = 1\n" * 300], tokens=1024, max_length=128)
    assert probe.record.corpus.name == "documents passed from Python"
    assert any("REPETITIVE" in warning for warning in probe.warnings)
    with pytest.raises(CorpusError):
        eigencache.probe("ref-gpt2", text=["short"])


def test_a_model_object_needs_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="`tokenizer` is missing"):
        eigencache.probe(AutoModelForCausalLM.from_pretrained(bundled_path("ref-gpt2")))


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, eigencache; print([m for m in ('torch', 'transformers', 'plotly', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
