"""`fit`, `encode`, `decode`: a cache becomes bytes and a cache again, whole or in part, and only with its own codec."""

import copy
import functools
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import eigencache
from eigencache.api import CacheCodec
from eigencache.calibration.session import Session
from eigencache.codec.saved.folder import LIVE
from eigencache.errors import (
    BudgetError,
    CodecError,
    ContainerError,
    CorpusError,
    ForeignContainerError,
    NotAContainerError,
    OutputError,
    StatisticsError,
    UnsupportedArchitectureError,
)
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, fit_codec
from eigencache.models.caches.tensors import cached_of
from eigencache.models.sources import bundled_path
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import token_ids

pytestmark = pytest.mark.slow

MODELS = ("llama", "gpt2", "deepseek_v2", "mistral", "gemma2")  # the last two with windows shorter than what is read
READ = 20


@functools.cache
def tiny_codec(name: str, bits: float = 5.5) -> CacheCodec:
    loaded = tiny_loaded(name)
    fitted = fit_codec(Session(loaded), random_sequences(*[40] * 64), EigenSettings(sinks=1, block=8), Goal.of(bits=bits))
    return CacheCodec(loaded, fitted.codec, fitted)


@torch.no_grad()
def read(name: str, tokens: int = READ, rows: int = 1) -> DynamicCache:
    return tiny_loaded(name).model(token_ids(rows)[:, :tokens], use_cache=True).past_key_values


@torch.no_grad()
def one_by_one(name: str, cache: DynamicCache, tokens: int = 4) -> torch.Tensor:
    ids = token_ids(1)[:, READ : READ + tokens]
    pieces = [tiny_loaded(name).model(piece, past_key_values=cache).logits for piece in ids.split(1, 1)]
    return torch.cat(pieces, 1)


# From a cache to bytes and back


@pytest.mark.parametrize("name", MODELS)
def test_at_a_high_rate_what_is_decoded_continues_as_the_plain_cache_does(name: str) -> None:
    codec = tiny_codec(name)
    blob = codec.encode(read(name))
    given = codec.decode(blob)
    assert isinstance(blob, bytes) and isinstance(given, DynamicCache)
    plain = read(name)
    assert given.get_seq_length() == plain.get_seq_length() == READ
    assert [type(layer) for layer in given.layers] == [type(layer) for layer in plain.layers]
    for mine, theirs in zip(given.layers, plain.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert float((a - b).norm() / b.norm()) < 0.15  # what matters little to the loss may be further off
    expected, found = one_by_one(name, plain), one_by_one(name, given)
    assert float((found - expected).std() / expected.std()) < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_it_generates_what_the_plain_cache_generates(name: str) -> None:
    model, ids = tiny_loaded(name).model, token_ids(1)[:, :READ]
    codec = tiny_codec(name)
    held = codec.decode(codec.encode(read(name, READ - 1)))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, past_key_values=held, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "tokens", [slice(0, 5), slice(3, 11), slice(8, 16), slice(-4, None), slice(7, 8), slice(None, -1), slice(5, None)]
)
def test_a_part_is_that_part_of_the_whole(name: str, tokens: slice) -> None:
    codec = tiny_codec(name)
    blob = codec.encode(read(name))
    whole = codec.decode(blob)
    held = READ if name != "mistral" else whole.layers[0].keys.shape[2]  # where all layers have a window, the rest is gone
    if name == "mistral" and max(tokens.start or 0, tokens.stop or 0) > held:
        with pytest.raises(CodecError, match="every layer has a window"):
            codec.decode(blob, tokens)
        return
    span = range(held)[tokens]
    windows = {"mistral": (0, 1, 2), "gemma2": (0, 2)}.get(name, ())  # layers that attend to their last 8 tokens alone
    if windows and (span.stop < held or span.start > held - whole.layers[windows[0]].keys.shape[2]):
        said = r"layer 0 attends to the last \d tokens before position \d+, but only \d are present"
        with pytest.raises(CodecError, match=said):
            codec.decode(blob, tokens)
        return
    part = codec.decode(blob, tokens)
    assert part.get_seq_length() == whole.get_seq_length() - held + span.stop
    for mine, theirs in zip(part.layers, whole.layers, strict=True):
        missing = held - theirs.keys.shape[2]  # what a layer with a window no longer holds
        own = slice(max(0, span.start - missing), max(0, span.stop - missing))
        assert torch.equal(mine.keys, theirs.keys[:, :, own]) and torch.equal(mine.values, theirs.values[:, :, own])


@pytest.mark.parametrize("name", MODELS)
def test_layers_one_by_one_are_those_of_the_whole(name: str) -> None:
    codec = tiny_codec(name)
    blob = codec.encode(read(name))
    whole, layers = codec.decode(blob), codec.decode_layers(blob)
    indices = [i for i, layer in enumerate(whole.layers) if layer.is_initialized]
    for index, (i, (keys, values)) in zip(indices, layers, strict=True):
        assert i == index and not keys.requires_grad
        assert torch.equal(keys, whole.layers[i].keys) and torch.equal(values, whole.layers[i].values)
    with pytest.raises(CodecError, match="a str is no container"):
        codec.decode_layers("prefix.ekv")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [slice(0, 8), slice(12, None), slice(0, READ)])
def test_tokens_that_every_window_has_left_behind_are_refused(tokens: slice) -> None:
    codec, cache = tiny_codec("mistral"), read("mistral")
    held = cache.layers[0].keys.shape[2]
    with pytest.raises(CodecError, match=rf"so that {held} tokens from position {READ - held} on are there"):
        codec.decode(codec.encode(cache), tokens)


def test_what_is_no_slice_and_no_bytes_is_refused() -> None:
    codec = tiny_codec("llama")
    blob = codec.encode(read("llama"))
    with pytest.raises(CodecError, match="`tokens` is 5: it must be a non-empty contiguous slice of the 20 stored tokens"):
        codec.decode(blob, 5)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="a str is no container: give the bytes"):
        codec.decode("prefix.ekv")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [slice(0, 10, 2), slice(9, 3, -1), slice(5, 5), slice(READ, None)])
def test_what_is_no_stretch_is_refused(tokens: slice) -> None:
    codec = tiny_codec("llama")
    with pytest.raises(CodecError, match="non-empty contiguous slice of the 20 stored tokens"):
        codec.decode(codec.encode(read("llama")), tokens)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest_caches_are_encoded(name: str, tokens: int) -> None:
    codec = tiny_codec(name)
    given = codec.decode(codec.encode(read(name, tokens)))
    assert given.get_seq_length() == tokens
    assert all(torch.isfinite(layer.keys).all() for layer in given.layers)


def test_bytes_are_the_same_every_time_and_any_buffer_is_read() -> None:
    codec = tiny_codec("llama")
    blob = codec.encode(read("llama"))
    assert codec.encode(read("llama")) == blob
    for buffer in (bytearray(blob), memoryview(blob)):
        assert torch.equal(codec.decode(buffer).layers[0].keys, codec.decode(blob).layers[0].keys)  # type: ignore[arg-type]


def test_the_cache_that_is_encoded_is_left_alone() -> None:
    cache = read("gemma2")
    before = copy.deepcopy(cached_of(cache))
    tiny_codec("gemma2").encode(cache)
    assert all(torch.equal(a, b) for i, both in cached_of(cache).items() for a, b in zip(both, before[i], strict=True))


# What is refused


def test_several_rows_are_refused() -> None:
    with pytest.raises(CodecError, match="a cache of 2 rows: encode them one by one, each taken out of a copy"):
        tiny_codec("llama").encode(read("llama", rows=2))


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(CodecError, match="the cache is empty"):
        tiny_codec("llama").encode(DynamicCache())


def test_a_cache_of_another_kind_is_refused() -> None:
    static = StaticCache(config=tiny_loaded("llama").model.config, max_cache_len=24)
    tiny_loaded("llama").model(token_ids(1), past_key_values=static)
    with pytest.raises(CodecError, match="layer 0 of the cache is a StaticLayer"):
        tiny_codec("llama").encode(static)
    with pytest.raises(CodecError, match="`cache` is of type tuple, not a transformers cache"):
        tiny_codec("llama").encode(())


@pytest.mark.parametrize("other", ["gpt2", "deepseek_v2"])
def test_the_cache_of_another_model_is_refused(other: str) -> None:
    with pytest.raises(CodecError, match=r"other heads in layers .*: this codec was fitted on another model"):
        tiny_codec("llama").encode(read(other))


def test_bytes_of_another_codec_are_refused() -> None:
    with pytest.raises(ForeignContainerError, match="use the codec that wrote it"):
        tiny_codec("mistral").decode(tiny_codec("llama").encode(read("llama")))


def test_damage_is_named() -> None:
    codec = tiny_codec("llama")
    blob = codec.encode(read("llama"))
    with pytest.raises(NotAContainerError):
        codec.decode(b"no container")
    for broken in (blob[:-1], blob[:40], blob + b"\0", blob[:-3] + bytes([blob[-3] ^ 1]) + blob[-2:], b""):
        with pytest.raises(ContainerError):
            codec.decode(broken)


def test_a_cache_with_nan_is_refused() -> None:
    cache = read("llama")
    cache.layers[1].values[0, 0, 3, 2] = torch.nan
    with pytest.raises(CodecError, match="NaN or infinite"):
        tiny_codec("llama").encode(cache)


# On a bundled model, saved and loaded


@pytest.fixture(scope="module")
def fitted() -> CacheCodec:
    said: set[str] = set()
    codec = eigencache.fit(
        "ref-deepseek",
        bits=2,
        tokens=6144,
        max_length=128,
        settings=EigenSettings(metric="frobenius"),
        on_progress=lambda what, done, of: said.add(what),
    )
    assert {"vectors", "held-out vectors", "preparing the fit", "scoring a codec"} <= said
    return codec


@torch.no_grad()
def prompt(codec: CacheCodec) -> tuple[torch.Tensor, DynamicCache]:
    ids = codec.loaded.tokenizer(
        "def test_codec(self):\n    return [x for x in range(10)]\n" * 6, return_tensors="pt"
    ).input_ids
    return ids, codec.loaded.model(ids[:, :-1]).past_key_values


@pytest.fixture(scope="module")
def folder(fitted: CacheCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "deep" / "codec"
    fitted.save(folder)
    return folder


def test_a_model_is_fitted_in_one_call_to_the_size_that_was_asked_for(fitted: CacheCodec) -> None:
    assert fitted.fitted is not None
    assert fitted.fitted.expected.bits_per_value == pytest.approx(2, rel=0.01)
    ids, cache = prompt(fitted)
    held = cached_of(cache)
    blob = fitted.encode(cache)
    assert 8 * len(blob) / sum(x.numel() for both in held.values() for x in both) < 3
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = fitted.loaded.model.generate(ids, **options)
    assert torch.equal(fitted.loaded.model.generate(ids, past_key_values=fitted.decode(blob), **options), plain)


def test_what_was_saved_makes_the_same_bytes(fitted: CacheCodec, folder: Path) -> None:
    loaded = CacheCodec.load(folder, "ref-deepseek")
    _, cache = prompt(fitted)
    blob = fitted.encode(cache)
    assert loaded.encode(cache) == blob and loaded.codec.sha256 == fitted.codec.sha256
    a, b = (one.decode(blob).layers for one in (fitted, loaded))
    assert all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(a, b, strict=True))


def test_a_model_object_is_taken_too(folder: Path) -> None:
    path = bundled_path("ref-deepseek")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    assert CacheCodec.load(folder, model, tokenizer).loaded.model is model


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(CodecError, match="fitted on ref-deepseek"):
        CacheCodec.load(folder, "ref-gpt2")
    path = bundled_path("ref-deepseek")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with pytest.raises(CodecError, match="use `dtype` float32"):
        CacheCodec.load(folder, model, AutoTokenizer.from_pretrained(path))
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight += 0.01
    with pytest.raises(CodecError, match="other weights or another configuration"):
        CacheCodec.load(folder, other, AutoTokenizer.from_pretrained(path))


def test_the_dtype_of_a_named_model_can_be_given(folder: Path) -> None:
    for dtype in ("float32", None):
        assert CacheCodec.load(folder, "ref-deepseek", device="cpu", dtype=dtype).loaded.dtype_name == "float32"
    with pytest.raises(CodecError, match="ref-deepseek is loaded in bfloat16: use `dtype` float32"):
        CacheCodec.load(folder, "ref-deepseek", device="cpu", dtype="bfloat16")


def test_a_bad_folder_is_reported_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "codec")
    (tmp_path / "codec" / LIVE).mkdir()
    for bad in (tmp_path / "none", tmp_path / "codec"):
        with pytest.raises(CodecError, match=str(bad)):
            CacheCodec.load(bad, "no-such-model")


def test_a_loaded_codec_is_saved_as_it_lay_and_nothing_else_is_overwritten(fitted, folder: Path, tmp_path: Path) -> None:
    CacheCodec.load(folder, "ref-deepseek").save(tmp_path / "sub" / "again")
    for path in folder.iterdir():
        assert (tmp_path / "sub" / "again" / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "sub")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files than a codec and was not changed"):
        fitted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_without_a_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="no such folder"):
        CacheCodec.load(tmp_path / "none", "ref-deepseek")
    (tmp_path / "config.json").write_text("{}")  # a model
    with pytest.raises(CodecError, match="holds no codec: name a folder that `eigencache fit`"):
        CacheCodec.load(tmp_path, "ref-deepseek")


# What is asked for


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({"bits": 1.0, "ratio": 8.0}, "cannot be combined. Give only one of `bits`, `ratio` and `max_nll`"),
        ({"bits": 1.0, "ratio": 8.0, "max_nll": 0.1}, "`bits` and `ratio` and `max_nll` cannot be combined"),
        ({"bits": 0.0}, "`bits`=0 must be a number above 0"),
        ({"ratio": -2.0}, "`ratio`=-2 must be a number above 0"),
        ({"max_nll": float("nan")}, "`max_nll`=nan must be a number above 0"),
        ({"ratio": float("inf")}, "`ratio`=inf must be a number above 0"),
    ],
)
def test_a_goal_that_makes_no_sense_is_named(goal: dict[str, float], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Goal.of(**goal)


def test_goals_are_bits_or_a_loss() -> None:
    assert Goal.of(bits=2) == Goal.of(ratio=8) == Goal(bits=2)
    assert Goal.of() == Goal(max_nll=0.01) and Goal.of(max_nll=0.5) == Goal(max_nll=0.5)


def test_what_cannot_be_fitted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="`bits` and `ratio`"):
        eigencache.fit("ref-deepseek", bits=1, ratio=2, tokens=1024)
    with pytest.raises(StatisticsError, match=r"8 sequences are too few: 16 are needed"):
        eigencache.fit("ref-deepseek", bits=1, tokens=1024, max_length=128)
    with pytest.raises(CorpusError):
        eigencache.fit("ref-deepseek", text=["short"])
    with pytest.raises(UnsupportedArchitectureError, match="not keys and values"):
        fit_codec(Session(tiny_loaded("jamba")), random_sequences(*[20] * 16), EigenSettings(text=False), Goal.of(bits=4))
