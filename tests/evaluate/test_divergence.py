"""Greedy answers part where a codec makes them part, and nowhere else."""

import copy

import numpy as np
import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.codec.base import SixteenBit
from eigencache.errors import CorpusError, ModelError, NonFiniteError
from eigencache.evaluate.divergence import cut_prompts, divergence, generate_greedily, measure_divergence
from eigencache.evaluate.prefix import Window, read_prefix
from eigencache.records.quality import Divergence
from stub_codecs import Identity, NaNs, Zeros, bundled, random_sequences, tiny_loaded


def test_identity_never_parts_and_zeros_ruin() -> None:
    text = random_sequences(64, 64, vocabulary=4000)
    seen: list[tuple[int, int]] = []
    same, half, zeros = measure_divergence(
        Session(bundled("ref-llama"), batch_size=2, on_progress=lambda _, done, of: seen.append((done, of))),
        text,
        {"identity": Identity(), "16 bit": SixteenBit(), "zeros": Zeros()},
        prompts=3,
        prompt_tokens=32,
        new_tokens=12,
    )
    assert same.tokens_until_parting == [12] * 3 and same.agreement == [1.0] * 3 and same.never_parted == 3
    assert half.mean_tokens_until_parting > zeros.mean_tokens_until_parting
    assert zeros.mean_agreement < 0.5 and zeros.never_parted == 0
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "deepseek_v3"])
@torch.no_grad()
def test_identity_in_the_models_dtype_generates_bit_for_bit_the_same(name: str) -> None:
    loaded = tiny_loaded(name)
    (found,) = measure_divergence(
        Session(loaded), random_sequences(30, 30), {"identity": Identity()}, prompts=2, prompt_tokens=20, new_tokens=20
    )
    assert found.never_parted == 2


@torch.no_grad()
def test_generation_is_the_argmax_of_whole_passes_whatever_the_models_own_settings() -> None:
    loaded = bundled("ref-gpt2")
    ids = torch.from_numpy(cut_prompts(random_sequences(24, vocabulary=4000), 1, 24))
    expected = ids
    for _ in range(6):
        logits = loaded.model(input_ids=expected, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    loaded.model.generation_config, kept = copy.deepcopy(loaded.model.generation_config), loaded.model.generation_config
    loaded.model.generation_config.update(repetition_penalty=5.0, eos_token_id=int(expected[0, 25]))
    try:
        found = generate_greedily(read_prefix(loaded, ids[:, :-1]), ids, None, 6)
    finally:
        loaded.model.generation_config = kept
    assert found.tolist() == expected[:, 24:].tolist()


def test_parting_counts_the_equal_tokens_before_the_first_other_one() -> None:
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    answers = torch.tensor([[1, 2, 9, 4], [9, 2, 3, 4], [1, 2, 3, 4]])
    found = divergence("some", reference, answers, 7)
    assert found.tokens_until_parting == [2, 0, 4] and found.agreement == [0.75, 0.75, 1.0]
    assert (found.mean_tokens_until_parting, found.median_tokens_until_parting) == (2, 2)
    assert found.median_agreement == 0.75 and found.mean_agreement == pytest.approx(2.5 / 3)
    assert found.never_parted == 1
    assert Divergence.model_validate_json(found.model_dump_json()) == found


def test_prompts_are_pieces_of_the_text_that_do_not_overlap() -> None:
    text = random_sequences(25, 9, 30)
    prompts = cut_prompts(text, 5, 10)
    assert len({p.tobytes() for p in prompts}) == 5
    assert (prompts[0] == text.ids[0][:10]).all() and (prompts[-1] == text.ids[2][20:]).all()
    assert (cut_prompts(text, 2, 10)[1] == text.ids[2][:10]).all()
    assert np.issubdtype(prompts.dtype, np.int64)
    with pytest.raises(CorpusError, match="`prompts` 6: random ids has only 5 prompts of 10 tokens"):
        cut_prompts(text, 6, 10)
    with pytest.raises(CorpusError, match="at least 2"):
        cut_prompts(text, 1, 1)


@torch.no_grad()
def test_what_cannot_be_generated_is_refused_in_one_line() -> None:
    text = random_sequences(60)
    with pytest.raises(ModelError, match="64 positions"):
        measure_divergence(Session(tiny_loaded("gpt2")), text, {}, prompts=1, prompt_tokens=50, new_tokens=15)
    with pytest.raises(CorpusError, match="at least 1"):
        measure_divergence(Session(tiny_loaded("gpt2")), text, {}, prompts=0)
    with pytest.raises(NonFiniteError, match="NaN"):
        measure_divergence(Session(tiny_loaded("llama")), text, {"nan": NaNs()}, prompts=1, prompt_tokens=20, new_tokens=3)


@torch.no_grad()
def test_a_window_as_long_as_the_text_hides_the_codec() -> None:
    text = random_sequences(20)
    (found,) = measure_divergence(
        Session(tiny_loaded("llama")), text, {"zeros": Zeros()}, prompts=1, prompt_tokens=20, new_tokens=8, window=Window(28)
    )
    assert found.never_parted == 1
