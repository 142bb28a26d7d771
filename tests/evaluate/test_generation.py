"""Text from a cache is what the model generates with that cache, streamed whole, with the bytes the cache really has."""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from eigencache.calibration.session import Session
from eigencache.codec.live.codec import LiveCodec
from eigencache.errors import CorpusError, ModelError
from eigencache.evaluate.generation import _Stream, generate_text, parted_at
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, LiveGoal, fit_codec
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.load import LoadedModel
from eigencache.records.generation import Generated
from stub_codecs import bundled, random_sequences, tiny_loaded

pytestmark = pytest.mark.slow

PROMPT = "In the beginning there were keys, and there were values, and each of them took sixteen bits, for every token. " * 2


class Characters:
    """A tokenizer whose tokens are ASCII characters."""

    pad_token_id = eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Bytes:
    """A tokenizer whose tokens are single bytes of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def characters(name: str) -> LoadedModel:
    """A tiny model of one's own: a compressed cache changes what its attention goes through."""
    loaded = tiny_loaded(name)
    return replace(loaded, model=copy.deepcopy(loaded.model), tokenizer=Characters())  # type: ignore[arg-type]


@functools.cache
def live() -> LiveCodec:
    settings = EigenSettings(metric="frobenius", text=False, sinks=0)
    fitted = fit_codec(
        Session(tiny_loaded("llama")), random_sequences(*[160] * 16), settings, Goal.of(bits=6), live=LiveGoal(bits=4)
    )
    assert fitted.live is not None
    return fitted.live.codec


def answer(loaded: LoadedModel, prompt: str, new: int, cache: Any) -> list[int]:
    """The likeliest tokens after a prompt, as transformers finds them."""
    ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "past_key_values": cache}
    return loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()  # type: ignore


# What is generated


def test_without_a_codec_it_is_what_the_model_generates() -> None:
    loaded, pieces = bundled("ref-llama"), []
    prompt = "def mean(numbers):\n    return"
    found = generate_text(loaded, prompt, None, max_new_tokens=24, on_text=pieces.append)
    assert found.tokens == answer(loaded, prompt, 24, DynamicCache(config=loaded.model.config)) and len(found.tokens) == 24
    assert found.text == loaded.tokenizer.decode(found.tokens) == "".join(pieces)
    assert len(pieces) > 12
    assert found.prompt_tokens == len(loaded.tokenizer(prompt)["input_ids"])


@pytest.mark.parametrize("new", [1, 2, 70])
def test_with_a_codec_it_is_what_the_model_generates_from_a_compressed_cache(new: int) -> None:
    loaded = characters("llama")
    found = generate_text(loaded, PROMPT, live(), max_new_tokens=new)
    cache = CompressedCache(loaded.model, live())
    assert found.tokens == answer(loaded, PROMPT, new, cache) and len(found.tokens) == new
    assert found.nbytes == cache.nbytes and cache.get_seq_length() == len(PROMPT) + new - 1


def test_a_plain_cache_generates_the_same_before_and_after_a_compressed_one() -> None:
    loaded = characters("llama")
    before = generate_text(loaded, PROMPT, None, max_new_tokens=30)
    generate_text(loaded, PROMPT, live(), max_new_tokens=4)
    after = generate_text(loaded, PROMPT, None, max_new_tokens=30)
    assert before.tokens == after.tokens and before.nbytes == after.nbytes


def test_bytes_are_those_of_the_caches() -> None:
    loaded = characters("llama")
    plain, packed = (generate_text(loaded, PROMPT, codec, max_new_tokens=9) for codec in (None, live()))
    held, values = len(PROMPT) + 9 - 1, loaded.geometry.values_per_token
    assert plain.nbytes == 4 * values * held
    assert plain.sixteen_bit_nbytes == packed.sixteen_bit_nbytes == 2 * values * held
    assert packed.nbytes == live().nbytes_of(held) < packed.sixteen_bit_nbytes / 2


def test_it_ends_where_the_model_ends() -> None:
    loaded = characters("llama")
    tokens = generate_text(loaded, PROMPT, live(), max_new_tokens=40).tokens
    at = next(i for i in range(3, 40) if tokens[i] not in tokens[:i])
    loaded.model.generation_config.eos_token_id = tokens[at]  # type: ignore[union-attr]
    found = generate_text(loaded, PROMPT, live(), max_new_tokens=40)
    assert found.tokens == tokens[: at + 1]
    assert found.sixteen_bit_nbytes == 2 * loaded.geometry.values_per_token * (len(PROMPT) + at)


def test_a_seed_draws_the_same_again_and_another_seed_something_else() -> None:
    loaded = characters("llama")
    for codec in (None, live()):
        one, again, other = (
            generate_text(loaded, PROMPT, codec, max_new_tokens=20, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)
        )
        assert one == again != other
        greedy = [generate_text(loaded, PROMPT, codec, max_new_tokens=20, seed=seed).tokens for seed in (1, 2)]
        assert greedy[0] == greedy[1] not in (one, other)


def test_a_low_temperature_is_nearly_the_likeliest() -> None:
    loaded = characters("llama")
    cold = generate_text(loaded, PROMPT, live(), max_new_tokens=20, temperature=1e-4, seed=1)
    assert cold.tokens == generate_text(loaded, PROMPT, live(), max_new_tokens=20).tokens


def test_times_are_of_the_prompt_and_of_the_tokens_after_the_first() -> None:
    one, more = (generate_text(characters("llama"), PROMPT, None, max_new_tokens=n) for n in (1, 12))
    assert one.tokens_per_second is None and one.step_seconds is None and one.prompt_seconds > 0
    assert more.step_seconds is not None and more.tokens_per_second == 1 / more.step_seconds and more.prompt_seconds > 0


def test_side_information_is_that_of_the_codec() -> None:
    plain, compressed = (generate_text(characters("llama"), PROMPT, c, max_new_tokens=2) for c in (None, live()))
    assert plain.side_nbytes == 0 and compressed.side_nbytes == live().nbytes > 0


def test_an_empty_prompt_is_refused() -> None:
    for codec in (None, live()):
        with pytest.raises(CorpusError, match="the prompt has no tokens"):
            generate_text(characters("llama"), "", codec)


def test_more_positions_than_a_model_has_learned_are_refused() -> None:
    loaded = characters("gpt2")
    assert loaded.model.config.max_position_embeddings == 64
    assert len(generate_text(loaded, "a" * 60, None, max_new_tokens=4).tokens) == 4
    with pytest.raises(ModelError, match="the prompt has 60 tokens and `max_new_tokens` is 5, but gpt2 has 64 positions"):
        generate_text(loaded, "a" * 60, None, max_new_tokens=5)


# The stream


def streamed(data: bytes) -> tuple[list[str], list[str]]:
    """What came after every byte, and what the end gave."""
    pieces: list[str] = []
    stream = _Stream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    after = []
    for byte in data:
        stream.put(torch.tensor([byte]))
        after.append("".join(pieces))
    stream.end()
    assert stream.ids == list(data) and stream.said == "".join(pieces)
    return after, pieces


@pytest.mark.parametrize("text", ["plain", "héllo", "日本語", "a🙂b", "🙂", "e\u0301", "x\ufffdy", "\ufffd", ""])
def test_a_character_comes_as_soon_as_it_is_whole_and_never_in_pieces(text: str) -> None:
    after, pieces = streamed(text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        ends = [len(text[:i].encode()) for i in range(1, len(text) + 1)]
        assert [after[end - 1] for end in ends] == [text[: i + 1] for i in range(len(text))]
        assert all(text.startswith(seen) and "\ufffd" not in seen for seen in after)


def test_an_answer_that_stops_within_a_character_shows_so_at_the_end() -> None:
    after, pieces = streamed("a🙂".encode()[:-1])
    assert set(after) == {"a"} and "".join(pieces) == "a\ufffd"


@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_the_text_they_decode_to(data: bytes) -> None:
    assert "".join(streamed(data)[1]) == data.decode(errors="replace")


def test_the_prompt_is_not_repeated() -> None:
    pieces: list[str] = []
    stream = _Stream(Bytes(), pieces.append)
    stream.put(torch.tensor([list(b"prompt")]))
    assert not pieces and not stream.ids
    stream.end()
    assert not "".join(pieces)


# Where two part


def generated(*tokens: int, step: float | None = None) -> Generated:
    return Generated(list(tokens), "", 3, 10, 20, 0.5, step)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((), (), None),
        ((1, 2, 3), (1, 5, 3), 1),
        ((4, 2), (1, 2), 0),
        ((1, 2, 3), (1, 2, 4), 2),
        ((1, 2), (1, 2, 3), 2),
        ((1, 2), (1, 3, 3), 1),
        ((), (1,), 0),
    ],
)
def test_answers_part_after_the_tokens_that_are_the_same(one, other, expected) -> None:
    assert parted_at(generated(*one), generated(*other)) == parted_at(generated(*other), generated(*one)) == expected


def test_speed_is_that_of_a_median_step() -> None:
    assert generated(1, 2, 3, step=0.25).tokens_per_second == 4
    for none in (generated(1), generated(1, 2, step=0.0)):
        assert none.tokens_per_second is None
