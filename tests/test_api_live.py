"""`fit(live=…)`, `CompressedCache`, `compressed`: a model generates from packed blocks inside, and as before afterwards."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import eigencache
import eigencache.fitting.fit
from eigencache import CompressedCache
from eigencache.api import CacheCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.folder import LIVE
from eigencache.errors import CodecError, OutputError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import LiveGoal
from eigencache.fitting.live import LiveSettings
from eigencache.models.load import LoadedModel, load
from stub_codecs import tiny_loaded

pytestmark = pytest.mark.slow

GREEDY = {"do_sample": False, "pad_token_id": 0}
TEXT = "def mean(numbers):\n    return sum(numbers) / len(numbers)\n\n\n" * 12


@pytest.fixture(scope="module")
def own() -> LoadedModel:
    """A model of this module alone, because compressed caches add hooks to it."""
    return load("ref-llama", device="cpu")


@pytest.fixture(scope="module")
def codec(own: LoadedModel) -> CacheCodec:
    return eigencache.fit(
        own.model,
        own.tokenizer,
        "stdlib",
        tokens=4096,
        max_length=256,
        bits=1.0,
        settings=EigenSettings(metric="frobenius", text=False),
        live=LiveGoal(bits=4),
    )


@pytest.fixture
def model(own: LoadedModel) -> Iterator[Any]:
    """The model, which is restored after each test."""
    before = own.model.config._attn_implementation or "eager"
    yield own.model
    for name in ("forward", "generate"):
        own.model.__dict__.pop(name, None)
    own.model.set_attn_implementation(before)


@pytest.fixture(scope="module")
def folder(codec: CacheCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "codec"
    codec.save(folder)
    return folder


@pytest.fixture(scope="module")
def ids(own: LoadedModel) -> torch.Tensor:
    found = torch.tensor([own.tokenizer(TEXT)["input_ids"]])[:, :194]
    assert found.shape[1] == 194
    return found


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Generate four tokens, and return them with their cache."""
    return model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY | options)


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    return model(ids, **options)


def packed(cache: CompressedCache) -> list[torch.Tensor]:
    return [chunk.slot(slot) for layer in cache.compressed_layers for chunk in layer.chunks for slot in (0, 1)]


def is_as_before(model: Any, ids: torch.Tensor, attention: str, logits: torch.Tensor) -> None:
    assert model.config._attn_implementation == attention != "eigencache"
    assert not {"generate", "forward"} & vars(model).keys()
    assert type(generate(model, ids).past_key_values) is DynamicCache
    out = forward(model, ids, use_cache=True)
    assert type(out.past_key_values) is DynamicCache and torch.equal(out.logits, logits)


# A cache of packed bytes


def test_a_live_codec_of_the_size_that_was_asked_for_is_fitted_beside_the_stored_one(codec: CacheCodec) -> None:
    assert isinstance(codec.live, LiveCodec) and codec.live.bits_per_value == pytest.approx(4, rel=0.02)
    assert codec.fitted is not None and codec.fitted.expected.bits_per_value == pytest.approx(1, rel=0.01)
    assert codec.fitted.live is not None and codec.fitted.live.codec is codec.live
    assert codec.fitted.live.expected.delta_nll < 0.1


def test_a_compressed_cache_serves_generate_and_stays_small(model, codec: CacheCodec, own: LoadedModel, ids) -> None:
    assert codec.live is not None
    plain = generate(model, ids)
    cache = CompressedCache(model, codec)
    found = generate(model, ids, past_key_values=cache)
    held = cache.get_seq_length()
    assert found.past_key_values is cache and held == 194 + 4 - 1
    assert cache.nbytes < 2 * own.geometry.values_per_token * held / 3
    assert cache.nbytes == sum(cache.ledger().values()) == codec.live.nbytes_of(held)
    assert len(packed(cache)) and found.sequences[0, :194].equal(plain.sequences[0, :194])
    assert generate(model, ids, past_key_values=CompressedCache(model, codec.live)).sequences.equal(found.sequences)


def test_what_is_read_through_it_is_close_to_what_the_plain_cache_gives(model, codec: CacheCodec, ids) -> None:
    def ahead(cache: Any) -> torch.Tensor:
        forward(model, ids[:, :190], past_key_values=cache)
        return forward(model, ids[:, 190:], past_key_values=cache).logits

    plain = ahead(DynamicCache(config=model.config))
    found = ahead(CompressedCache(model, codec))
    assert not torch.equal(found, plain)
    assert float((found - plain).std() / plain.std()) < 0.15
    assert found.argmax(-1).equal(plain.argmax(-1))


# Inside `with compressed(...)`


def test_inside_generate_and_forward_use_compressed_caches_and_afterwards_nothing_does(model, codec, ids) -> None:
    attention, logits = model.config._attn_implementation, forward(model, ids, use_cache=True).logits
    alone = generate(model, ids, past_key_values=CompressedCache(model, codec))
    model.set_attn_implementation(attention)
    with eigencache.compressed(model, codec) as given:
        assert given is model
        one, other = generate(model, ids), generate(model, ids)
        assert type(one.past_key_values) is CompressedCache and one.past_key_values is not other.past_key_values
        assert one.sequences.equal(other.sequences) and one.sequences.equal(alone.sequences)
        for options in ({"use_cache": True}, {}):
            cache = forward(model, ids, **options).past_key_values
            assert type(cache) is CompressedCache and cache.get_seq_length() == 194 and packed(cache)
    is_as_before(model, ids, attention, logits)
    with eigencache.compressed(model, codec):
        assert type(generate(model, ids).past_key_values) is CompressedCache
    is_as_before(model, ids, attention, logits)


def test_inside_a_cache_of_ones_own_or_none_at_all_is_respected(model, codec: CacheCodec, ids) -> None:
    expected = generate(model, ids).sequences
    with eigencache.compressed(model, codec):
        mine = DynamicCache(config=model.config)
        found = generate(model, ids, past_key_values=mine)
        assert found.past_key_values is mine and mine.get_seq_length() == 197 and found.sequences.equal(expected)
        mine = DynamicCache(config=model.config)
        assert forward(model, ids, past_key_values=mine).past_key_values is mine and mine.get_seq_length() == 194
        packed_one = CompressedCache(model, codec)
        assert generate(model, ids, past_key_values=packed_one).past_key_values is packed_one
        assert forward(model, ids, use_cache=False).past_key_values is None
        assert generate(model, ids, use_cache=False).sequences.equal(expected)


def test_a_cache_that_came_from_inside_continues_token_by_token(model, codec: CacheCodec, ids) -> None:
    with eigencache.compressed(model, codec):
        expected = generate(model, ids)
        out, tokens = forward(model, ids), []
        for _ in range(4):
            tokens.append(out.logits[:, -1:].argmax(-1))
            out = forward(model, tokens[-1], past_key_values=out.past_key_values)
    assert torch.cat(tokens, 1).equal(expected.sequences[:, 194:])


def test_after_an_exception_inside_the_model_is_as_before(model, codec: CacheCodec, ids) -> None:
    attention, logits = model.config._attn_implementation, forward(model, ids, use_cache=True).logits
    with pytest.raises(RuntimeError, match="mine"), eigencache.compressed(model, codec):
        generate(model, ids)
        raise RuntimeError("mine")
    is_as_before(model, ids, attention, logits)


def test_one_inside_another_ends_as_before_too(model, codec: CacheCodec, ids) -> None:
    attention, logits = model.config._attn_implementation, forward(model, ids, use_cache=True).logits
    with eigencache.compressed(model, codec):
        with eigencache.compressed(model, codec):
            assert type(generate(model, ids).past_key_values) is CompressedCache
            assert type(forward(model, ids).past_key_values) is CompressedCache
        assert type(forward(model, ids).past_key_values) is CompressedCache
    is_as_before(model, ids, attention, logits)


# Refusals


def test_a_codec_without_a_live_part_is_refused_and_the_model_left_alone(model, codec: CacheCodec, ids) -> None:
    attention, logits = model.config._attn_implementation, forward(model, ids, use_cache=True).logits
    for without in (CacheCodec(codec.loaded, codec.codec, codec.fitted), codec.codec, None):
        words = rf"`codec` is of {type(without).__name__} and has no live codec: give what eigencache.fit"
        with pytest.raises(CodecError, match=words):
            CompressedCache(model, without)
        with pytest.raises(CodecError, match=words), eigencache.compressed(model, without):
            pytest.fail("nothing is run")
        is_as_before(model, ids, attention, logits)


def test_another_model_is_refused_and_left_alone(codec: CacheCodec) -> None:
    other = tiny_loaded("llama").model
    before = other.config._attn_implementation
    words = "the model is not the one that this codec was fitted on: other weights, another configuration"
    with pytest.raises(CodecError, match=words), eigencache.compressed(other, codec):
        pytest.fail("nothing is run")
    words = r"the codec has layers \[3, 4, 5, 6\], in which the model has no cache. It was fitted on another model"
    with pytest.raises(CodecError, match=words), eigencache.compressed(other, codec.live):
        pytest.fail("nothing is run")
    assert other.config._attn_implementation == before and "generate" not in vars(other)


# Saved codecs


def test_what_was_saved_and_loaded_packs_the_same_bytes(model, codec: CacheCodec, own, folder: Path, ids) -> None:
    again = CacheCodec.load(folder, own.model, own.tokenizer)
    assert isinstance(again.live, LiveCodec) and again.live.name == codec.live.name  # type: ignore[union-attr]
    mine, theirs = (CompressedCache(model, one) for one in (codec, again))
    for cache in (mine, theirs):
        forward(model, ids, past_key_values=cache)
    assert len(packed(mine)) == len(packed(theirs)) == 14 and mine.nbytes == theirs.nbytes
    assert all(torch.equal(a, b) for a, b in zip(packed(mine), packed(theirs), strict=True))


def test_a_model_that_attends_to_a_compressed_cache_is_still_the_one_of_the_folder(model, codec, own, folder: Path) -> None:
    with eigencache.compressed(model, codec):
        assert CacheCodec.load(folder, model, own.tokenizer).live is not None


def test_a_folder_without_a_live_part_is_loaded_without_one(model, own, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "stored", ignore=shutil.ignore_patterns(LIVE))
    again = CacheCodec.load(tmp_path / "stored", own.model, own.tokenizer)
    assert again.live is None
    with pytest.raises(CodecError, match="has no live codec"):
        CompressedCache(model, again)


def test_a_codec_without_a_live_part_replaces_one_with_it_whole(codec: CacheCodec, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "codec"
    codec.save(place)
    files = lambda of: {str(p.relative_to(of)): p.read_bytes() for p in of.rglob("*") if p.is_file()}  # noqa: E731 - of both
    assert files(place) == files(folder) and any(name.startswith(LIVE) for name in files(place))
    CacheCodec(codec.loaded, codec.codec, codec.fitted).save(place)
    assert files(place) == {name: data for name, data in files(folder).items() if not name.startswith(LIVE)}


# Goals of the fit


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"live": True, "max_nll": 0.05}, {"bits": None, "max_nll": 0.05, "safe": False}),
        ({"live": True}, {"bits": None, "max_nll": None, "safe": False}),
        ({"live": True, "bits": 1.0}, {"bits": None, "max_nll": None, "safe": False}),
        ({"live": LiveGoal(bits=3), "max_nll": 0.05}, {"bits": 3, "max_nll": None, "safe": False}),
        ({"live": LiveGoal(safe=True), "bits": 1.0}, {"bits": None, "max_nll": None, "safe": True}),
        ({"max_nll": 0.05}, None),
    ],
)
def test_the_live_codec_loses_no_more_than_was_allowed_or_is_what_its_goal_says(own, options, expected, monkeypatch) -> None:
    asked: list[dict[str, Any]] = []
    stored, live = SimpleNamespace(to=lambda device: stored), object()

    def fit_live_target(*_: Any, **given: Any) -> Any:
        asked.append({name: given[name] for name in ("bits", "max_nll", "safe")})
        return SimpleNamespace(codec=live, expected=None)

    for name, stand_in in {
        "fit_eigen": lambda *_, **__: None,
        "fit_target": lambda *_, **__: (stored, SimpleNamespace(coded_bits=None)),
        "eigen_fitting_of": lambda *_: SimpleNamespace(_replace=lambda **_: None),
        "fit_live": lambda *_: SimpleNamespace(settings=LiveSettings(alpha=1.0)),
        "fit_live_target": fit_live_target,
        "check_packed_block": lambda *_: None,  # the sequences are short, to be quick
    }.items():
        monkeypatch.setattr(eigencache.fitting.fit, name, stand_in)
    found = eigencache.fit(own.model, own.tokenizer, [TEXT] * 8, tokens=1024, max_length=32, **options)
    assert asked == ([] if expected is None else [expected])
    assert found.live is (None if expected is None else live)


def test_an_outer_one_continues_after_an_inner_one_ended(model, codec: CacheCodec, ids) -> None:
    with eigencache.compressed(model, codec):
        for inner in (codec, None):
            with contextlib.suppress(CodecError), eigencache.compressed(model, inner):
                pass
            assert type(generate(model, ids).past_key_values) is CompressedCache


def test_inside_a_cache_is_made_whatever_way_it_is_asked_for(model, codec: CacheCodec, ids) -> None:
    mine = DynamicCache(config=model.config)
    with eigencache.compressed(model, codec), torch.no_grad():
        assert type(forward(model, ids, use_cache=None).past_key_values) is CompressedCache
        found = generate(model, ids, use_cache=None).past_key_values
        assert type(found) is CompressedCache and found.get_seq_length() == 197  # no token twice
        assert model(ids, None, None, mine).past_key_values is mine


def test_a_file_of_the_users_own_beside_the_live_part_is_left_alone(codec: CacheCodec, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "codec")
    (tmp_path / "codec" / LIVE / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files than a codec and was not changed"):
        codec.save(tmp_path / "codec")
    assert (tmp_path / "codec" / LIVE / "thesis.txt").read_text() == "mine"
