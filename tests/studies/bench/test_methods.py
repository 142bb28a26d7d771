"""Every method fits a tiny model of every kind or is refused with a reason; what it holds comes back in shape and size."""

import functools

import pytest
import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.base import CacheMaker, Codec
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.placement import placed, tensors_in
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.evaluate.prefix import read_prefix
from eigencache.models.load import LoadedModel
from eigencache.models.residual import find_sites, weight_rows
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import unrotate
from eigencache.studies.bench.context import BenchContext
from eigencache.studies.bench.methods import METHODS, chosen_methods
from stub_codecs import random_sequences, tiny_loaded

pytestmark = pytest.mark.slow

MODELS = ("llama", "gpt2", "deepseek_v2", "gemma2")
RATES = (0.5, 2.0)
CACHES = tuple(m for m, one in METHODS.items() if m.startswith("hf-") or one.about.startswith("kvpress"))  # no codecs
CODECS = tuple(m for m in METHODS if m not in CACHES)
TOKENS = 40
LATENT_ONLY = {"oscar": "it caches a latent", "oscar-no-window": "it caches a latent", "xquant": "not wider than the hidden"}
Cached = dict[int, tuple[Tensor, Tensor]]


@functools.cache
def bench(name: str) -> BenchContext:
    return BenchContext(Session(tiny_loaded(name)), random_sequences(*[TOKENS] * 24), RATES)


@functools.cache
def codecs(name: str, method: str) -> dict[str, Codec]:
    return METHODS[method].codecs(bench(name))


@torch.no_grad()
def cached(loaded: LoadedModel, rows: int = 2) -> Cached:
    """Tokens that nothing was fitted on."""
    ids = torch.stack([torch.from_numpy(ids) for ids in random_sequences(*[TOKENS] * rows, seed=5).ids])
    return read_prefix(loaded, ids).stored


def bits(codec: Codec, held: Cached) -> float:
    return 8 * codec.encode(held, 0).nbytes / sum(x.numel() for both in held.values() for x in both)


def lost(codec: Codec, held: Cached) -> float:
    """Share of the energy that does not come back, of the layer that loses most."""
    given = codec.decode(codec.encode(held, 0))
    assert given.keys() == held.keys()
    for i, both in held.items():
        assert all(
            a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all() for a, b in zip(given[i], both, strict=True)
        )
    of = lambda i: [((a - b).square().sum(), b.square().sum()) for a, b in zip(given[i], held[i], strict=True)]  # noqa: E731
    return max(float(error / whole) for i in held for error, whole in of(i))


@pytest.mark.parametrize("method", CODECS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_holds_a_cache_of_every_kind_or_says_why_not(name: str, method: str) -> None:
    loaded = tiny_loaded(name)
    why = METHODS[method].refuses(loaded)
    assert bool(why) == (name == "deepseek_v2" and method in LATENT_ONLY)
    if why:
        assert LATENT_ONLY[method] in why
        return
    held = cached(loaded)
    found = codecs(name, method)
    assert found and METHODS[method].about
    losses = {point: lost(codec, held) for point, codec in found.items()}
    sizes = {point: bits(codec, held) for point, codec in found.items()}
    dearest, cheapest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    assert 0 < sizes[cheapest] <= sizes[dearest] <= 16 + 0.1
    assert losses[dearest] <= losses[cheapest] < 1.1 and losses[dearest] < 0.9
    for codec in found.values():
        assert codec.nbytes >= 0 and codec.name


@pytest.mark.parametrize("method", CACHES)
@torch.no_grad()
def test_a_method_of_another_package_makes_caches_or_says_why_not(method: str) -> None:
    loaded = tiny_loaded("llama")
    if why := METHODS[method].refuses(loaded):
        assert any(words in why for words in ("is not installed", "kvpress works on", "cannot be")), why
        return
    prefix = read_prefix(loaded, torch.from_numpy(random_sequences(TOKENS, seed=5).ids[0])[None])
    for maker in METHODS[method].codecs(bench("llama")).values():
        assert isinstance(maker, CacheMaker)
        tokens, nbytes = maker.held(maker.cache_of(prefix))
        assert tokens == TOKENS and nbytes > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["eigen", "eigen-no-text", "kvtc-no-window"])
def test_methods_that_take_any_rate_are_near_it(name: str, method: str) -> None:
    held = cached(tiny_loaded(name))
    for point, codec in codecs(name, method).items():
        exact = codec.kept.sinks if isinstance(codec, EigenCodec) else 0
        rate = (16 * exact + float(point) * (TOKENS - exact)) / TOKENS
        assert bits(codec, held) <= rate * 1.1 + 0.2  # a header, and blocks of few tokens
    assert set(codecs(name, method)) == {"0.5", "2"}


@pytest.mark.parametrize("method", ["kvtc", "kivi", "oscar"])
def test_what_is_held_exactly_swallows_a_cache_no_longer_than_it(method: str) -> None:
    held = cached(tiny_loaded("llama"))
    assert all(bits(codec, held) > 15 for codec in codecs("llama", method).values())
    assert all(bits(codec, held) < 8 for codec in codecs("llama", f"{method}-no-window").values())


def test_rates_that_tokens_alone_exceed_are_left_out() -> None:
    low = BenchContext(Session(tiny_loaded("gpt2")), random_sequences(*[TOKENS] * 24), (0.001, 2.0))
    assert list(METHODS["eigen"].codecs(low)) == ["2"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_calibration_does_not_decide_comes_out_alike_on_other_text(name: str) -> None:
    other = BenchContext(Session(tiny_loaded(name)), random_sequences(*[TOKENS] * 24, seed=9), RATES)
    held = cached(tiny_loaded(name))
    for method in (m for m in CODECS if not METHODS[m].fitted):
        for point, codec in METHODS[method].codecs(other).items():
            first = codecs(name, method)[point]
            pairs = zip(
                codec.decode(codec.encode(held, 0)).values(), first.decode(first.encode(held, 0)).values(), strict=True
            )
            assert all(torch.equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


# Rows of weights


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma2", "gpt_neox", "falcon", "phi3"])
def test_rows_of_weights_make_the_keys_and_values_that_are_cached(name: str) -> None:
    """Linear, fused and the transposed one of GPT-2: from the input of the projection, before rotation."""
    loaded = tiny_loaded(name)
    ids = torch.from_numpy(random_sequences(7, seed=5).ids[0])[None]
    held, rotations = read_prefix(loaded, ids).stored, rotations_of(loaded)
    for slot, kind in enumerate(("k", "v")):
        inputs: dict[int, Tensor] = {}
        sites = find_sites(loaded.model, loaded.geometry, kind, None, ids)  # type: ignore[arg-type]
        keep = lambda at, into: lambda _module, args: into.__setitem__(at, args[0])  # noqa: E731
        hooks = [site.module.register_forward_pre_hook(keep(site.layer_idx, inputs)) for site in sites]
        loaded.model(ids)
        for hook in hooks:
            hook.remove()
        for site in sites:
            weight, bias = weight_rows(site)
            assert not weight.requires_grad and weight.shape == (site.width, inputs[site.layer_idx].shape[-1])
            made = inputs[site.layer_idx] @ weight.mT + (0 if bias is None else bias)
            x = held[site.layer_idx][slot]
            if slot == 0 and site.layer_idx in rotations:
                rotation = rotations[site.layer_idx]
                x = unrotate(x, rotation.angles(torch.arange(7)), rotation.pairing)
            torch.testing.assert_close(made.unflatten(-1, (x.shape[1], -1)).transpose(1, 2), x, rtol=1e-4, atol=1e-4)


def test_a_module_that_is_no_plain_layer_has_no_rows() -> None:
    (site, *_) = find_sites(tiny_loaded("llama").model, tiny_loaded("llama").geometry, "k", None, torch.ones(1, 4).long())
    odd = type(site)(2, torch.nn.Embedding(4, 4), site.columns, 4)
    with pytest.raises(UnsupportedArchitectureError, match="layer 2: the matrix cannot be read, because Embedding fails"):
        weight_rows(odd)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_xquant_is_exact_but_for_the_rounding_of_the_input(name: str) -> None:
    losses = [lost(codec, cached(tiny_loaded(name))) for codec in codecs(name, "xquant").values()]
    assert losses == sorted(losses) and losses[0] < 1e-3 < losses[-1]


def test_xquant_is_not_to_be_had_where_keys_are_normed() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="are not the output of a known projection"):
        METHODS["xquant"].codecs(BenchContext(Session(tiny_loaded("qwen3")), random_sequences(*[20] * 16), RATES))


# Names


def test_methods_are_chosen_by_name_in_order_and_all_without_names() -> None:
    assert chosen_methods(None) == list(METHODS)
    assert chosen_methods("kvtc, eigen,int") == ["kvtc", "eigen", "int"]


@pytest.mark.parametrize("names", ["eigen,nuqx", "nuqx", "eigen,,int", "Eigen"])
def test_an_unknown_method_is_named_with_those_that_exist(names: str) -> None:
    with pytest.raises(CodecError, match=r"`methods` .*: no such method\. Choose from eigen, eigen-no-text, live, kvtc"):
        chosen_methods(names)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", CODECS)
def test_a_codec_that_is_moved_has_every_tensor_where_it_was_asked_for(method: str, name: str) -> None:
    if METHODS[method].refuses(tiny_loaded(name)):
        return
    for codec in codecs(name, method).values():
        assert placed(codec, "cpu") is codec or [t.device.type for t in tensors_in(placed(codec, "cpu"))].count("cpu")
        moved = list(tensors_in(placed(codec, "meta")))
        assert len(moved) == len(list(tensors_in(codec)))
        rotations = getattr(getattr(codec, "layout", codec), "rotations", {})
        angles = {id(rotation.frequencies) for _, rotation in rotations.values()}  # made on the CPU, in float64
        assert all(tensor.device.type == "meta" or id(tensor) in angles for tensor in moved)


def test_what_is_shared_in_a_codec_stays_shared() -> None:
    basis = torch.randn(3, 3)
    one = placed({"a": basis, "b": (basis, [basis])}, "meta")
    assert one["a"] is one["b"][0] is one["b"][1][0]
