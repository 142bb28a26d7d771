import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eigencache.corpora.contexts import distinct_contexts
from eigencache.corpora.sequences import MIN_TAIL, Sequences, pack
from eigencache.corpora.text import Document, Text
from eigencache.errors import CorpusError

WITH_FIXTURES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=70)


class Letters:
    """A tokenizer with one token per character, its code point."""

    def __init__(self, bos_token_id=None, eos_token_id=None, adds_bos=False):
        self.bos_token_id, self.eos_token_id, self.adds_bos = bos_token_id, eos_token_id, adds_bos
        self.calls = []

    def __call__(self, texts, *, add_special_tokens=True, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": [*([self.bos_token_id] if self.adds_bos and add_special_tokens else []), *map(ord, texts)]}
        assert not add_special_tokens and not verbose
        self.calls.append(list(texts))
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def concatenated(sequences: Sequences) -> list[int]:
    return np.concatenate(sequences.ids).tolist()


def varied(length: int, seed: int = 0) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(33, 1000, length)))


@WITH_FIXTURES
@given(documents=DOCUMENTS, max_length=st.integers(8, 60), tokens=st.none() | st.integers(8, 900))
def test_packing_loses_no_token_and_repeats_none(tokenizer, make_text, documents, max_length, tokens):
    expected = []
    for document in documents:
        expected += [tokenizer.eos_token_id, *tokenizer([document], add_special_tokens=False)["input_ids"][0]]
    expected = expected[:tokens]
    if len(expected) < max_length:
        with pytest.raises(CorpusError):
            pack(make_text(*documents), tokenizer, tokens=tokens, max_length=max_length)
        return
    packed = pack(make_text(*documents), tokenizer, tokens=tokens, max_length=max_length)
    tail = len(expected) % max_length
    kept = len(expected) - (tail if tail < MIN_TAIL else 0)
    assert concatenated(packed) == expected[:kept]
    assert all(len(ids) == max_length for ids in packed.ids[:-1]) and all(ids.dtype == np.int64 for ids in packed.ids)
    assert packed.corpus.tokens == kept and packed.corpus.sequences == len(packed.ids)


@pytest.mark.parametrize(
    ("tail", "kept"), [(0, [64, 64]), (1, [64, 64]), (31, [64, 64]), (32, [64, 64, 32]), (63, [64, 64, 63])]
)
def test_a_last_sequence_is_kept_from_32_tokens_on(make_text, tail, kept):
    packed = pack(make_text(varied(128 + tail)), Letters(), tokens=None, max_length=64)
    assert [len(ids) for ids in packed.ids] == kept
    assert packed.corpus.tokens == sum(kept)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"), [(None, None, "abc"), (None, 0, "\0ab\0c"), (1, 0, "\1ab\1c"), (0, 1, "\0ab\0c")]
)
def test_a_document_is_preceded_by_bos_or_else_eos_or_else_nothing(make_text, bos, eos, expected):
    long = "x" * 40
    packed = pack(make_text("ab", "c" + long), Letters(bos, eos), tokens=None, max_length=len(expected) + 40)
    assert concatenated(packed) == [ord(character) for character in expected + long]


def test_a_continued_piece_is_preceded_by_nothing():
    pieces = [Document("a", "a" * 20), Document("a", "b" * 20, continued=True), Document("c", "c" * 20)]
    packed = pack(Text.scan("given", lambda: pieces), Letters(1), tokens=None, max_length=62)
    assert concatenated(packed) == [ord(c) for c in "\1" + "a" * 20 + "b" * 20 + "\1" + "c" * 20]


@WITH_FIXTURES
@given(documents=DOCUMENTS, max_length=st.integers(8, 60), tokens=st.none() | st.integers(8, 900))
def test_every_sequence_begins_with_bos_where_the_tokenizer_adds_it(make_text, documents, max_length, tokens):
    stream = [i for document in documents for i in (1, *map(ord, document))]
    if len(stream) < max_length or (tokens is not None and tokens < max_length):
        return
    packed = pack(make_text(*documents), Letters(1, 0, adds_bos=True), tokens=tokens, max_length=max_length)
    assert all(ids[0] == 1 and len(ids) == max_length for ids in packed.ids[:-1]) and packed.ids[-1][0] == 1
    assert packed.corpus.tokens == sum(map(len, packed.ids)) <= (tokens or 2 * len(stream))
    at = 0
    for ids in packed.ids:  # without the BOS tokens that begin no document, these are the tokens in order
        piece = ids.tolist() if stream[at] == 1 else ids[1:].tolist()
        assert stream[at : at + len(piece)] == piece
        at += len(piece)
    used_up = tokens is not None and packed.corpus.tokens + MIN_TAIL > tokens
    assert used_up or at + min(MIN_TAIL, max_length) > len(stream)


def test_tokenizing_stops_when_there_are_enough_tokens():
    read = []

    def start():
        for number in range(10_000):
            read.append(number)
            yield Document(str(number), varied(100, number))

    text = Text("endless", start_again := Restarting(start), "0" * 64)
    tokenizer = Letters(1)
    packed = pack(text, tokenizer, tokens=640, max_length=64)
    assert start_again.started == 1 and len(read) <= 64 and len(tokenizer.calls) == 1
    assert packed.corpus.tokens == 640


def test_large_documents_are_tokenized_few_at_a_time(make_text):
    tokenizer = Letters()
    pack(make_text(*(varied(150_000, seed) for seed in range(4))), tokenizer, tokens=160_000, max_length=1000)
    assert [len(call) for call in tokenizer.calls] == [2]


class Restarting:
    def __init__(self, start):
        self.start, self.started = start, 0

    def __iter__(self):
        self.started += 1
        return self.start()


def test_progress_counts_up_to_the_tokens_wanted(make_text):
    seen = []
    pack(make_text(*[varied(50)] * 4), Letters(), tokens=120, max_length=60, on_progress=lambda *call: seen.append(call))
    assert seen == [(50, 120), (100, 120), (120, 120)]


FEWER = "given: {0} tokens were requested, fewer than one sequence of {1}. Request at least {1}, or use shorter sequences."


def test_a_text_that_ends_early_is_a_warning_with_both_figures(make_text):
    warnings = pack(make_text(varied(12_345)), Letters(), tokens=65_536, max_length=512).corpus.warnings
    assert "asked for 65,536 tokens, the text has 12,345" in warnings
    assert pack(make_text(varied(12_345)), Letters(), tokens=12_345, max_length=512).corpus.warnings == []


@pytest.mark.parametrize(
    ("length", "tokens", "max_length", "message"),
    [
        (100, None, 512, "given: text has 100 tokens, fewer than one sequence of 512: give more text or `max_length` 100"),
        (100, 1024, 512, "given: text has 100 tokens, fewer than one sequence of 512: give more text or `max_length` 100"),
        (31, None, 512, "given: text has 31 tokens, fewer than one sequence of 512: give more text"),
        (100, "abc", 64, "`tokens`='abc' is not an integer"),
        (100, None, 64.0, "`max_length`=64.0 is not an integer"),
        (
            100,
            99,
            512,
            FEWER.format(99, 512),
        ),
        (
            100,
            0,
            8,
            FEWER.format(0, 8),
        ),
        (100, None, 7, "`max_length` 7 is too small: a sequence needs at least 8 tokens"),
        (100, None, -1, "`max_length` -1 is too small: a sequence needs at least 8 tokens"),
    ],
)
def test_less_than_one_sequence_is_refused_with_figures(make_text, length, tokens, max_length, message):
    with pytest.raises(CorpusError) as caught:
        pack(make_text(varied(length)), Letters(), tokens=tokens, max_length=max_length)
    assert str(caught.value) == message


def test_the_record_counts_what_was_used(make_text):
    text = make_text(varied(2000), name="some:text")
    packed = pack(text, Letters(1), tokens=1500, max_length=64)
    corpus = packed.corpus
    assert (corpus.name, corpus.sha256, corpus.max_length) == ("some:text", text.sha256, 64)
    assert (corpus.tokens, corpus.sequences) == (23 * 64, 23)
    assert corpus.distinct_token_ids == len(set(concatenated(packed)))
    assert corpus.distinct_8grams == distinct_contexts(packed.ids) == 23 * 57
    assert corpus.repetition == 0 and corpus.warnings == []


@pytest.mark.parametrize("samples", [64, 1000])
def test_four_sentences_repeated_are_called_repetitive(tokenizer, make_text, samples):
    sentences = ["The cache holds keys.", "A probe reads it.", "Ranks are low here.", "Or so it seems."]
    packed = pack(make_text(*(sentences[i % 4] for i in range(samples))), tokenizer, tokens=None, max_length=32)
    corpus, distinct = packed.corpus, packed.corpus.distinct_8grams
    share = f"{100 * corpus.repetition:.0f} %"
    assert corpus.repetition > 0.8 and distinct < 100
    assert (
        f"REPETITIVE TEXT: {corpus.tokens:,} tokens hold only {distinct} distinct 8-token contexts ({share} repeats): "
        "ranks measured on it describe the text, not the model"
    ) in corpus.warnings
    assert any(warning.startswith(f"TOO LITTLE TEXT: only {distinct} distinct") for warning in corpus.warnings)


def test_copied_sequences_are_counted(make_text):
    packed = pack(make_text(varied(64) * 3 + varied(64 * 20, seed=1)), Letters(), tokens=None, max_length=64)
    (warning,) = [w for w in packed.corpus.warnings if w.startswith("COPIED")]
    assert "2 of 23 equal an earlier one" in warning


def test_ordinary_text_gives_no_warning(tokenizer, make_text):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(500)]
    documents = [" ".join(rng.choice(words, 400)) for _ in range(20)]
    assert pack(make_text(*documents), tokenizer, tokens=8192, max_length=256).corpus.warnings == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_hold_every_sequence_once_in_order_padded_at_the_right(make_text, batch_size):
    packed = pack(make_text(varied(64 * 4 + 40)), Letters(), tokens=None, max_length=64)
    seen = []
    for input_ids, attention_mask, indices in packed.batches(batch_size, pad_id=7):
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        assert input_ids.shape == attention_mask.shape == (len(indices), max(len(packed.ids[i]) for i in indices))
        assert len(indices) <= batch_size
        for row, mask, i in zip(input_ids, attention_mask, indices, strict=True):
            length = len(packed.ids[i])
            assert row[:length].tolist() == packed.ids[i].tolist() and (row[length:] == 7).all()
            assert mask[:length].all() and not mask[length:].any()
        seen += indices
    assert seen == list(range(5))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused_at_once(make_text, batch_size):
    packed = pack(make_text(varied(64)), Letters(), tokens=None, max_length=64)
    with pytest.raises(CorpusError, match=f"`batch_size` {batch_size} is too small"):
        packed.batches(batch_size, pad_id=0)
