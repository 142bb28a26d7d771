"""The matrix of a module includes adapters, packed weights and hooks; the weight of a plain module is read."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eigencache import CompressedCache
from eigencache.calibration.attention_metric import attention_metrics
from eigencache.calibration.session import Session
from eigencache.errors import UnsupportedArchitectureError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.fitting.token_predictor import vocabulary
from eigencache.models.folding import coefficient_cache, folded
from eigencache.models.key_bias import key_biases
from eigencache.models.linear_map import bias_of, is_plain, linear_map
from eigencache.models.load import LoadedModel, with_evidence
from eigencache.models.residual import find_sites, weight_rows
from eigencache.models.rope_detection import rotations_of
from live_codecs import fine_codec, long_ids, long_model
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import token_ids


class LowRank(nn.Module):
    """A linear layer wrapped with an adapter, as PEFT does; `weight` is the weight without the adapter."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, scale: float = 0.3, shift: float = 0.0) -> None:
        super().__init__()
        self.base, self.shift = base, shift
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(scale * torch.randn(2, inputs, generator=generator))
        self.up = nn.Parameter(scale * torch.randn(outputs, 2, generator=generator))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT + self.shift

    def merged(self) -> nn.Module:
        """Return the equivalent plain layer."""
        plain, change = copy.deepcopy(self.base), (self.up @ self.down).detach()
        with torch.no_grad():
            plain.weight += change.mT if isinstance(plain, Conv1D) else change  # type: ignore[operator]
            if self.shift:
                plain.bias += self.shift  # type: ignore[operator]
        return plain


class Packed(nn.Module):
    """A layer with integer tensors only, like packed weights, that quantizes activations to 127 steps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = float(base.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (base.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (x / step).round() @ self.weight.to(x.dtype).mT * self.scale * step  # type: ignore[operator, union-attr]


def adapted(module: nn.Module, **settings: float) -> LowRank:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    inputs, outputs = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
    return LowRank(module, inputs, outputs, **settings)


def both(name: str, place: str, **settings: float) -> tuple[LoadedModel, LoadedModel]:
    """Return a tiny model with an adapter on a module of every layer, and the model with merged adapters."""
    loaded = tiny_loaded(name)
    models = []
    for make in (lambda one: one, LowRank.merged):
        model = copy.deepcopy(loaded.model)
        for path, module in list(model.named_modules()):
            if path.endswith(f".{place}"):
                model.set_submodule(path, make(adapted(module, **settings)))
        models.append(replace(loaded, model=model, geometry=with_evidence(loaded.geometry, model)))
    return models[0], models[1]


# Matrices and biases


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_wrapped_module_computes_is_found(bias: bool) -> None:
    plain = nn.Linear(7, 5, bias=bias)
    weight, own = linear_map(plain, 7)
    assert weight is plain.weight and own is plain.bias and is_plain(plain)
    module, x = adapted(plain), torch.randn(4, 7)
    assert not is_plain(module)
    weight, own = linear_map(module, 7)
    torch.testing.assert_close(x @ weight.mT + (0 if own is None else own), module(x), rtol=1e-5, atol=1e-5)
    assert (own is None) == (not bias) == (bias_of(module, 7) is None)


def test_a_bias_that_an_adapter_adds_is_found() -> None:
    module = adapted(nn.Linear(7, 5, bias=False), shift=0.25)
    assert module.bias is None
    for own in (linear_map(module, 7)[1], bias_of(module, 7)):
        torch.testing.assert_close(own, torch.full((5,), 0.25))


def test_a_transposed_layer_is_read_and_asked() -> None:
    plain = Conv1D(5, 7)
    nn.init.normal_(plain.bias)
    weight, own = linear_map(plain, 7)
    assert is_plain(plain) and weight.equal(plain.weight.mT) and own is plain.bias
    plain.register_forward_hook(lambda _module, _args, output: 2 * output)
    weight, own = linear_map(plain, 7)
    assert not is_plain(plain) and own is not None
    torch.testing.assert_close(weight, 2 * plain.weight.mT)
    torch.testing.assert_close(own, 2 * plain.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_asked_without_a_loss(dtype: torch.dtype) -> None:
    module = Packed(nn.Linear(64, 48, bias=False))
    module.register_buffer("packed", torch.ones(1).to(torch.float8_e4m3fn))
    module.register_buffer("scales", torch.ones(1, dtype=dtype))  # determines the dtype of activations
    weight, own = linear_map(module, 64)
    assert own is None and weight.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    expected = module.weight.float() * module.scale  # type: ignore[union-attr, operator]
    torch.testing.assert_close(weight.float(), expected, rtol=tolerance, atol=1e-6)


def test_hooks_and_other_weights_are_not_plain() -> None:
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked) and not is_plain(nn.Linear(3, 3, device="meta")) and not is_plain(nn.Identity())
    wrapped = nn.Linear(3, 3)
    wrapped.forward = wrapped.forward  # type: ignore[method-assign] # as accelerate does
    assert not is_plain(wrapped) and not is_plain(nn.Linear(3, 3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.GRU(3, 3)], ids=["other width", "not linear"])
def test_what_is_no_such_map_is_refused_by_name(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedArchitectureError, match="layer 3, kv_b_proj: "):
        linear_map(module, 3, "layer 3, kv_b_proj")


@pytest.mark.parametrize("bend", [nn.ReLU(), nn.Tanh(), nn.Dropout(0.5)])
def test_a_module_that_is_not_linear_is_refused_by_name(bend: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), bend)
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 3: a Sequential is not linear: call model.eval\(\)"):
        linear_map(module, 32, "layer 3")
    if isinstance(bend, nn.Dropout):
        torch.testing.assert_close(linear_map(module.eval(), 32)[0], module[0].weight)  # type: ignore[arg-type]


# The live cache


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    cache = CompressedCache(model, fine_codec(model))
    pieces = (ids[:, a:b] for a, b in ((0, 150), (150, 151), (151, 208)))
    found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert cache.compressed_layers[0].blocks
    return torch.cat(found, 1)


def latent_model(wrap: Callable[[nn.Linear], nn.Module]):
    model = copy.deepcopy(long_model("deepseek_v2"))
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = wrap(layer.self_attn.kv_b_proj)
    return model


@torch.no_grad()
@pytest.mark.parametrize("wrap", [adapted, Packed])
def test_what_the_expansion_of_a_latent_computes_is_seen(wrap: Callable[[nn.Linear], nn.Module]) -> None:
    model, ids = latent_model(wrap), long_ids(1)
    expected = model(input_ids=ids).logits
    if wrap is adapted:
        assert float((expected - long_model("deepseek_v2")(input_ids=ids).logits).abs().max()) > 0.3
    assert float((logits(model, ids) - expected).abs().max()) < 0.05


@torch.no_grad()
def test_an_adapter_that_is_switched_in_a_text_is_seen_by_the_next_token() -> None:
    model, ids = latent_model(adapted), long_ids(1)
    cache = CompressedCache(model, fine_codec(model))
    model(input_ids=ids[:, :150], past_key_values=cache, use_cache=True)
    plain = copy.deepcopy(model)(input_ids=ids[:, :150], use_cache=True).past_key_values
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.up.zero_()
    found, expected = (
        model(input_ids=ids[:, 150:151], past_key_values=past, use_cache=True).logits for past in (cache, plain)
    )
    assert float((found - expected).abs().max()) < 0.05


def test_a_module_that_cannot_be_asked_is_refused_before_the_first_token() -> None:
    class Deaf(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no CPU kernel\nand a stack of C++ frames")

    model = copy.deepcopy(long_model("deepseek_v2"))
    codec, old = fine_codec(model), model.model.layers[1].self_attn.kv_b_proj
    model.model.layers[1].self_attn.kv_b_proj = Deaf(old.in_features, old.out_features, bias=False)
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 1, kv_b_proj: the matrix cannot .*\(no CPU kernel\)$"):
        CompressedCache(model, codec)


def test_an_expansion_that_adds_a_bias_is_refused_before_the_first_token() -> None:
    codec = fine_codec(long_model("deepseek_v2"))
    with pytest.raises(UnsupportedArchitectureError, match="layer 0, kv_b_proj adds a bias"):
        CompressedCache(latent_model(lambda base: adapted(base, shift=0.25)), codec)


# Fits and measurements, equal with an adapter and with the merged adapter


@pytest.mark.parametrize(("name", "place"), [("llama", "o_proj"), ("gpt2", "attn.c_proj"), ("deepseek_v2", "kv_b_proj")])
def test_the_metric_of_attention_sees_adapters(name: str, place: str) -> None:
    found, expected = (
        attention_metrics(Session(one), random_sequences(12, 12), rotations_of(one)) for one in both(name, place)
    )
    without = attention_metrics(Session(tiny_loaded(name)), random_sequences(12, 12), rotations_of(tiny_loaded(name)))
    kind = "latent" if name == "deepseek_v2" else "values"
    for layer_idx, metric in expected[kind].items():
        torch.testing.assert_close(found[kind][layer_idx], metric, rtol=1e-4, atol=1e-6 * float(metric.abs().max()))
        assert float((without[kind][layer_idx] - metric).norm() / metric.norm()) > 0.05


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "place", "target"),
    [("llama", "o_proj", "v"), ("gpt2", "attn.c_proj", "v"), ("deepseek_v2", "kv_b_proj", "latent")],
)
def test_folding_keeps_adapters(name: str, place: str, target: str) -> None:
    shift = {} if name == "deepseek_v2" else {"shift": 0.25}
    loaded = both(name, place, **shift)[0]
    model, ids = loaded.model, token_ids()
    codec = PCACalibration(Session(loaded), random_sequences(*(64,) * 8), scopes=("head",)).fit(
        PCASettings(target, frame="post")
    )  # type: ignore[arg-type]
    run = lambda cache: model(input_ids=ids, past_key_values=cache, use_cache=True).logits  # noqa: E731
    expected = run(coefficient_cache(model, codec, decoded=True))
    with folded(model, loaded.geometry, codec) as cache:
        torch.testing.assert_close(run(cache), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_and_biases_of_keys_see_adapters(name: str) -> None:
    place = "k_proj" if name == "llama" else "c_attn"
    pair = both(name, place, shift=0.25)
    for layer_idx, expected in key_biases(pair[1]).items():
        torch.testing.assert_close(key_biases(pair[0])[layer_idx], expected, rtol=1e-4, atol=1e-5)
    assert len(key_biases(pair[0])) == len(pair[0].geometry.cached_layers)
    rows = [[weight_rows(site) for site in find_sites(one.model, one.geometry, "k", None, token_ids())] for one in pair]
    for (weight, bias), (merged, own) in zip(*rows, strict=True):
        assert own is not None
        torch.testing.assert_close(weight, merged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, own, rtol=1e-4, atol=1e-5)


def test_features_of_tokens_see_adapters() -> None:
    class Shifted(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + input[..., None].remainder(7)

    loaded = tiny_loaded("llama")
    own = replace(loaded, model=copy.deepcopy(loaded.model))
    plain = own.model.get_input_embeddings()
    own.model.set_input_embeddings(Shifted(*plain.weight.shape, _weight=plain.weight.data))  # type: ignore[arg-type]
    ids = torch.arange(own.embedded_ids)
    (_, found), (_, without) = vocabulary(own, ids), vocabulary(loaded, ids)
    merged = replace(loaded, model=copy.deepcopy(loaded.model))
    with torch.no_grad():
        merged.model.get_input_embeddings().weight += ids[:, None].remainder(7)  # type: ignore[operator]
    of = [x.of(torch.arange(100)) for x in (found, vocabulary(merged, ids)[1], without)]
    assert of[0].equal(of[1]) and not of[0].allclose(of[2], atol=0.1)
