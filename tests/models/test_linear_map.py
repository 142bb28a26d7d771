"""A module is asked what it computes: adapters, packed weights and offloaded ones included; a plain weight is read."""

import copy

import pytest
import torch
from torch import nn

from eigencache import CompressedCache
from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.linear_map import is_plain, linear_map
from live_codecs import fine_codec, long_ids, long_model


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as PEFT wraps one; `weight` is that of the layer alone."""

    def __init__(self, base: nn.Linear, scale: float = 0.3) -> None:
        super().__init__()
        self.base, self.in_features = base, base.in_features
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(scale * torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(scale * torch.randn(base.out_features, 2, generator=generator))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_wrapped_module_computes_is_found(bias: bool) -> None:
    plain = nn.Linear(7, 5, bias=bias)
    weight, own = linear_map(plain, 7)
    assert weight is plain.weight and own is plain.bias and is_plain(plain)
    module, x = LowRank(plain), torch.randn(4, 7)
    assert not is_plain(module)
    weight, own = linear_map(module, 7)
    torch.testing.assert_close(x @ weight.mT + (0 if own is None else own), module(x), rtol=1e-5, atol=1e-5)
    assert (own is None) == (not bias)


def test_hooks_and_other_weights_are_not_plain() -> None:
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked) and not is_plain(nn.Linear(3, 3, device="meta")) and not is_plain(nn.Identity())


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.GRU(3, 3)], ids=["other width", "not linear"])
def test_what_is_no_such_map_is_refused_by_name(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedArchitectureError, match="layer 3, kv_b_proj: "):
        linear_map(module, 3, "layer 3, kv_b_proj")


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    cache = CompressedCache(model, fine_codec(model))
    pieces = (ids[:, a:b] for a, b in ((0, 150), (150, 151), (151, 208)))
    found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert cache.compressed_layers[0].blocks
    return torch.cat(found, 1)


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """KL in nats, a mean over tokens."""
    return float((expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean())


@torch.no_grad()
def test_an_adapter_on_the_expansion_of_a_latent_is_seen() -> None:
    model, ids = copy.deepcopy(long_model("deepseek_v2")), long_ids(1)
    before = model(input_ids=ids).logits
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = LowRank(layer.self_attn.kv_b_proj)
    expected = model(input_ids=ids).logits
    assert float((expected - before).abs().max()) > 0.3
    assert float((logits(model, ids) - expected).abs().max()) < 0.05


@torch.no_grad()
def test_an_adapter_of_peft_is_seen() -> None:
    peft = pytest.importorskip("peft")
    model, ids = copy.deepcopy(long_model("deepseek_v2")), long_ids(1)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False)).eval()
    inner = wrapped.base_model.model
    expected = inner(input_ids=ids).logits
    with wrapped.disable_adapter():
        assert divergence(inner(input_ids=ids).logits, expected) > 0.05
    assert divergence(logits(inner, ids), expected) < 5e-3


@torch.no_grad()
def test_eight_bit_weights_are_asked_too() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, ids = copy.deepcopy(long_model("deepseek_v2")), long_ids(1)
    for layer in model.model.layers:
        old = layer.self_attn.kv_b_proj
        new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        layer.self_attn.kv_b_proj = new.to("cpu")
    expected = model(input_ids=ids).logits
    assert divergence(logits(model, ids), expected) < 5e-3


def test_a_module_that_cannot_be_asked_is_refused_before_the_first_token() -> None:
    class Deaf(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no CPU kernel")

    model = copy.deepcopy(long_model("deepseek_v2"))
    codec, old = fine_codec(model), model.model.layers[1].self_attn.kv_b_proj
    model.model.layers[1].self_attn.kv_b_proj = Deaf(old.in_features, old.out_features, bias=False)
    with pytest.raises(UnsupportedArchitectureError, match=r"layer 1, kv_b_proj: its matrix cannot be .*no CPU kernel"):
        CompressedCache(model, codec)
