"""Models, tokenizers and texts are accepted in every documented form; anything else is refused with one line."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel

import eigencache
from eigencache.errors import BudgetError, CodecError, CorpusError, EigencacheError, ModelError
from eigencache.inputs import check_names, model_of, several, text_of
from eigencache.models.sources import bundled_path
from eigencache.records.advice import Budget
from stub_codecs import bundled

TEXTS = ["The first of them.\nIt has two lines.", "And the second."]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXTS[0], "utf-8")
    return path


def read(given) -> list[str]:
    return [document.text for document in text_of(given).documents]


def test_texts_are_taken_as_they_come(file: Path) -> None:
    assert read(file) == read(str(file)) == read([file]) == read(TEXTS[0]) == TEXTS[:1]
    assert read(TEXTS) == read(iter(TEXTS)) == read([{"text": x, "id": 1} for x in TEXTS]) == TEXTS
    assert read([TEXTS[1], file]) == TEXTS[::-1]


def test_rows_and_columns_of_a_dataset_are_texts() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    assert read(rows) == read(rows["text"]) == TEXTS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "`text` is of type NoneType: pass a name such as 'stdlib', a path, or an iterable of strings"),
        (b"bytes", "`text` is of type bytes"),
        ({"train": []}, "`text` is of type dict"),
        (3, "`text` is of type int"),
        ([b"bytes"], "document 0 is a bytes: pass"),
        (["one", {"content": "two"}], 'document 1 is a dict without a string "text"'),
        (["one", "two \ud800"], r"document 1: character 4 ('\ud800') cannot be encoded as UTF-8: decode its source"),
        ([], "the text is empty or only whitespace"),
        (["", " "], "the text is empty or only whitespace"),
        ([Path("absent.txt")], "absent.txt"),
    ],
)
def test_what_is_no_text_is_named(given, words: str) -> None:
    with pytest.raises(CorpusError, match=re.escape(words)):
        text_of(given)


def test_a_model_and_a_tokenizer_may_be_names_paths_or_objects() -> None:
    known, path = bundled("ref-llama"), bundled_path("ref-llama")
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    for tokenizer in ("ref-llama", path, str(path), known.tokenizer, backend):
        found = model_of(known.model, tokenizer)
        assert found.model is known.model
        assert found.tokenizer("def run():")["input_ids"] == known.tokenizer("def run():")["input_ids"]
    assert model_of(path).geometry == model_of("ref-llama", known.tokenizer).geometry == known.geometry


def test_what_is_no_model_is_named() -> None:
    known = bundled("ref-llama")
    with pytest.raises(ModelError, match="`model` is of type LlamaConfig: pass a loaded transformers model, a name"):
        model_of(known.model.config, known.tokenizer)
    with pytest.raises(ModelError, match="`tokenizer` is missing: pass it as the argument after"):
        model_of(known.model)
    with pytest.raises(ModelError, match="`model` is a Linear, which is no transformers model: pass what Auto"):
        model_of(nn.Linear(2, 2), known.tokenizer)
    base = AutoModel.from_pretrained(bundled_path("ref-llama"))
    with pytest.raises(
        ModelError, match="`model` is a LlamaModel, which predicts no tokens: load it with AutoModelForCausalLM"
    ):
        eigencache.fit(base, known.tokenizer)


def test_one_value_is_a_list_of_one() -> None:
    assert several("ref-llama") == ["ref-llama"] and several(Path("a.json")) == [Path("a.json")] and several(3) == [3]
    assert several(("a", "b")) == several(iter("ab")) == ["a", "b"] and several([]) == []
    record = Budget.of_ppl("1%")
    assert several(record) == [record]


def test_names_are_checked_and_loaded_models_are_not() -> None:
    known = bundled("ref-llama")
    check_names(["ref-llama", bundled_path("ref-gpt2"), known, known.model, None])
    for name in ("ref-lama", Path("ref-lama")):
        with pytest.raises(ModelError, match=r"ref-lama: no such folder.*did you mean ref-llama\?"):
            check_names(["ref-llama", name])


def test_prefix_tuning_is_refused_before_the_work() -> None:
    peft = pytest.importorskip("peft")
    known = model_of(bundled_path("ref-llama"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(EigencacheError, match="prefix and prompt tuning"):
        eigencache.fit(peft.get_peft_model(known.model, config), known.tokenizer)


def test_a_goal_of_words_and_a_folder_in_place_of_a_codec_are_named() -> None:
    known = bundled("ref-llama")
    with pytest.raises(BudgetError, match="`bits`='2' must be a number above 0, not a str"):
        eigencache.fit(known.model, known.tokenizer, bits="2")  # type: ignore[arg-type]
    with pytest.raises(CodecError, match=r"`codec` is the path .*here, not a codec: load it with CacheCodec.load\("):
        eigencache.CompressedCache(known.model, Path("here"))
