"""A cache with an encoded past is read like an ordinary one in every architecture, and reports the bytes it has."""

import pytest
import torch

from eigencache.codec.base import SixteenBit
from eigencache.errors import CodecError, UnsupportedArchitectureError
from eigencache.geometry import geometry_from_config
from eigencache.models.caches.measuring_cache import MeasuringCache
from eigencache.models.gradients import cache_gradients
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from stub_codecs import Identity, Zeros
from tiny_models import NO_CACHE_NAMES, NO_RETURNED_CACHE_NAMES, available, tiny, token_ids

pytestmark = pytest.mark.versions

NAMES = [name for name in available() if name not in NO_CACHE_NAMES + NO_RETURNED_CACHE_NAMES]
USUAL = ("gpt2", "llama", "qwen2", "gemma3_text", "deepseek_v2")


@torch.no_grad()
def in_pieces(name: str, cache, pieces=(7, 6, 1, 1, 5, 4)) -> torch.Tensor:
    ids, logits, start = token_ids(), [], 0
    for length in pieces:
        logits.append(tiny(name)(input_ids=ids[:, start : start + length], past_key_values=cache, use_cache=True).logits)
        start += length
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", NAMES)
def test_identity_changes_nothing_bit_for_bit_in_every_architecture(name: str) -> None:
    from transformers import DynamicCache

    model = tiny(name)
    try:
        cache = MeasuringCache(model, Identity(), window=3)
    except UnsupportedArchitectureError as error:
        assert "not keys and values" in str(error)
        return
    assert torch.equal(in_pieces(name, cache), in_pieces(name, DynamicCache(config=model.config)))
    assert cache.blocks


@pytest.mark.parametrize("name", USUAL)
def test_zeros_change_what_is_read_so_the_cache_is_read(name: str) -> None:
    plain, ruined = (in_pieces(name, MeasuringCache(tiny(name), codec)) for codec in (Identity(), Zeros()))
    assert torch.equal(plain[:, :7], ruined[:, :7])  # nothing was read yet
    assert float((plain[:, 7:] - ruined[:, 7:]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", USUAL)
@pytest.mark.parametrize(("window", "block"), [(0, 1), (5, 1), (0, 8), (4, 3), (100, 1)])
def test_tokens_leave_the_window_in_blocks_and_each_is_encoded_once(name: str, window: int, block: int) -> None:
    cache = MeasuringCache(tiny(name), Identity(), window=window, block=block)
    in_pieces(name, cache)
    encoded = [(one.start, one.tokens) for one in cache.blocks]
    assert [start for start, _ in encoded] == [sum(tokens for _, tokens in encoded[:i]) for i in range(len(encoded))]
    assert all(tokens >= block for _, tokens in encoded)
    seen_before_the_last_piece, last = 20, 4
    left = seen_before_the_last_piece - sum(tokens for _, tokens in encoded)
    assert min(window, seen_before_the_last_piece) <= left < window + max(block, 1) or not encoded
    assert cache.get_seq_length() == seen_before_the_last_piece + last


def test_its_bytes_are_the_storages_of_blocks_and_windows() -> None:
    cache = MeasuringCache(tiny("llama"), SixteenBit(torch.float32), window=4)
    in_pieces("llama", cache)
    per_token = 3 * 2 * 2 * 16  # layers, slots, KV heads, head_dim
    encoded = sum(block.tokens for block in cache.blocks)
    assert encoded == 16
    assert cache.nbytes == 2 * per_token * (encoded * 2 + 8 * 4)  # 16 tokens in 16 bits, 8 as the model has them


def test_generation_with_beams_reorders_the_encoded_past() -> None:
    from transformers import DynamicCache

    model, ids = tiny("llama"), token_ids(batch=2, length=9)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    coded = model.generate(ids, past_key_values=MeasuringCache(model, Identity(), window=2), **options)
    assert torch.equal(plain, coded)


def test_going_back_is_refused() -> None:
    cache = MeasuringCache(tiny("llama"), Identity())
    in_pieces("llama", cache)
    with pytest.raises(CodecError, match="cannot be cropped"):
        cache.crop(-2)


def loaded(name: str) -> LoadedModel:
    return LoadedModel(name, tiny(name), None, geometry_from_config(tiny(name).config))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in USUAL if name != "gpt2"])
def test_rotations_are_found_and_undo_what_the_cache_holds(name: str) -> None:
    from eigencache.models.capture import Capture
    from eigencache.spectral.rope import unrotate

    one = loaded(name)
    rotations = rotations_of(one)
    with Capture(one.model, one.geometry) as capture:
        for layer in capture.run(token_ids()):
            rotation = rotations[layer.layer_idx]
            kind = "key_rope" if one.geometry.mla else "keys"
            stored = layer.tensors[f"{kind}_post_rope"]
            undone = unrotate(stored, rotation.angles(torch.arange(stored.shape[2])), rotation.pairing)
            torch.testing.assert_close(undone, layer.tensors[f"{kind}_pre_rope"].float(), rtol=1e-3, atol=1e-3)


def test_models_without_rotation_have_none() -> None:
    assert rotations_of(loaded("gpt2")) == {}


@pytest.mark.parametrize("name", USUAL)
def test_gradients_are_those_of_finite_differences_and_leave_the_model_alone(name: str) -> None:
    import copy

    model = copy.deepcopy(tiny(name))
    flags = {key: weight.requires_grad for key, weight in model.named_parameters()}
    ids = token_ids(batch=1, length=10)
    gradients = cache_gradients(model, ids)
    last = max(gradients)  # of the last layer nothing passes through another cache
    generator = torch.Generator().manual_seed(0)
    for slot in (0, 1):
        direction = torch.randn(gradients[last][slot].shape, generator=generator)
        step = 3e-3  # norms are computed in float32 whatever the dtype of the model
        losses = [_loss_with(model, ids, last, slot, sign * step * direction) for sign in (1, -1)]
        expected = (losses[0] - losses[1]) / (2 * step)
        assert float((gradients[last][slot] * direction).sum()) == pytest.approx(expected, rel=2e-2, abs=2e-3)
    assert flags == {key: weight.requires_grad for key, weight in model.named_parameters()}
    assert all(weight.grad is None for weight in model.parameters())


@torch.no_grad()
def _loss_with(model, ids: torch.Tensor, layer_idx: int, slot: int, change: torch.Tensor) -> float:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    store = cache.layers[layer_idx].update

    def update(keys, values, *args, **kwargs):
        keys, values = (x + change if i == slot else x for i, x in enumerate((keys, values)))
        return store(keys, values, *args, **kwargs)

    cache.layers[layer_idx].update = update
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
