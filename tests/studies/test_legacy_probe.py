"""The original probe: its text, its figures against NumPy on all 64 samples, and the count of its distinct vectors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, PreTrainedTokenizerFast

import cli_process
from eigencache.calibration.session import Session
from eigencache.records.probe import ClassicRow, ProbeRecord
from eigencache.studies.legacy_probe import REPEATED, SENTENCES, distinct_contexts, repeated_samples
from eigencache.studies.probe import ProbeSettings, probe_model


@pytest.fixture
def by_words() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, numbered from 4 in the order of their first appearance."""
    words = dict.fromkeys(" ".join(SENTENCES).replace(".", " .").replace(",", " ,").split())
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words, 4)}, unk_token="."))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_sample_repeats_one_sentence_and_is_cut_at_256_tokens(loaded, by_words) -> None:
    samples = repeated_samples(replace(loaded("llama"), tokenizer=by_words))
    assert len(samples) == len(SENTENCES) == 4
    for sentence, sample in zip(SENTENCES, samples, strict=True):
        once = by_words(sentence)["input_ids"]
        assert sample == (once * 30)[:256]  # 180 to 260 tokens are 20 repetitions; shorter samples begin again


def test_equal_prefixes_count_once() -> None:
    assert distinct_contexts([[1, 2, 3], [1, 2, 4], [2, 2, 3]]) == 2 + 2 + 3
    assert distinct_contexts([[7, 7, 7]] * 16) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_figures_are_those_of_an_svd_of_all_64_samples(name: str, loaded, sequences, by_words) -> None:
    one = replace(loaded(name), tokenizer=by_words)
    record = probe_model(Session(one), sequences(*[40] * 12), ProbeSettings(scopes=("layer",)))
    length = min(256, one.learned_positions or 256)
    samples = repeated_samples(one)
    ids = torch.tensor([samples[i % len(samples)] for i in range(64)])
    cache = DynamicCache(config=one.model.config)
    with torch.no_grad():
        one.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    distinct = len({tuple(row[:end]) for row in ids.tolist() for end in range(1, length + 1)})
    for kind in ("keys", "values"):
        energies_16, energies_32, ranks = [], [], []
        for layer in cache.layers:
            x = getattr(layer, kind).transpose(1, 2).flatten(0, 1).flatten(1).double().numpy()
            squares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
            shares = np.cumsum(squares) / squares.sum()
            energies_16.append(shares[:16][-1])
            energies_32.append(shares[:32][-1])
            ranks.append(np.searchsorted(shares, 0.99) + 1)
        (row,) = [row for row in record.classic if row.kind == kind and row.text == REPEATED]
        assert row.energy_16 == pytest.approx(np.mean(energies_16), abs=1e-5)
        assert row.energy_32 == pytest.approx(np.mean(energies_32), abs=1e-5)
        assert row.rank_99 == pytest.approx(np.mean(ranks))
        assert (row.vectors, row.distinct_vectors) == (64 * length, distinct)


def test_a_row_without_a_count_of_distinct_vectors_is_read() -> None:
    old = {"kind": "keys", "text": "this text", "vectors": 960, "energy_16": 0.8, "energy_32": 0.9, "rank_99": 30.0}
    assert ClassicRow.model_validate(old | {"assessment": "Compressible"}).distinct_vectors is None


@pytest.mark.slow
def test_the_command_line_shows_and_records_the_distinct_vectors(tmp_path: Path) -> None:
    command = ("probe", "ref-llama", "--view", "classic", "--tokens", 512, "--layers", "0,3", "-o", "out.json")
    shown = cli_process.shown(cli_process.run(*command, folder=tmp_path))
    rows = [row for row in ProbeRecord.load(tmp_path / "out.json").classic if row.text == REPEATED]
    assert [row.kind for row in rows] == ["keys", "values"]
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(row.kind) and REPEATED in line)
        assert f"16,384 ({row.distinct_vectors:,} distinct)" in line
        assert f"{row.energy_32:.3f}!" in line
