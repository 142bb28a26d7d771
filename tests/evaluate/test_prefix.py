"""A prefix read once and then through a cache gives what one pass over the whole text gives."""

import pytest
import torch

from eigencache.codec.base import SixteenBit
from eigencache.errors import ModelError, NonFiniteError, UnsupportedArchitectureError
from eigencache.evaluate.prefix import Window, check_positions, read_prefix
from stub_codecs import Identity, NaNs, Zeros, tiny_loaded
from tiny_models import token_ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "deepseek_v3"])
@torch.no_grad()
def test_the_logits_after_a_prefix_are_those_of_one_pass(name: str) -> None:
    loaded, ids = tiny_loaded(name), token_ids()
    whole = loaded.model(input_ids=ids, use_cache=False).logits
    prefix = read_prefix(loaded, ids[:, :15])
    plain = prefix.logits(ids[:, 15:], None)
    torch.testing.assert_close(plain, whole[:, 15:], atol=1e-4, rtol=1e-4)
    assert torch.equal(prefix.logits(ids[:, 15:], Identity()), plain)
    assert torch.equal(
        read_prefix(loaded, ids[:, :0]).logits(ids, Identity()), read_prefix(loaded, ids[:, :0]).logits(ids, None)
    )
    assert not torch.equal(prefix.logits(ids[:, 15:], Zeros()), plain)


@torch.no_grad()
def test_the_window_stays_as_it_is_and_the_prefix_is_not_changed_by_its_caches() -> None:
    loaded, ids = tiny_loaded("llama"), token_ids()
    prefix = read_prefix(loaded, ids[:, :15])
    first = prefix.logits(ids[:, 15:], SixteenBit())
    assert torch.equal(prefix.logits(ids[:, 15:], Zeros(), Window(15)), prefix.logits(ids[:, 15:], None))
    assert torch.equal(prefix.logits(ids[:, 15:], Zeros(), Window(0, 16)), prefix.logits(ids[:, 15:], None))
    assert not torch.equal(prefix.logits(ids[:, 15:], Zeros(), Window(14)), prefix.logits(ids[:, 15:], None))
    assert torch.equal(prefix.logits(ids[:, 15:], SixteenBit()), first)
    cache = prefix.cache(SixteenBit(), Window(4))
    loaded.model(input_ids=ids[:, 15:], past_key_values=cache)
    assert [block.tokens for block in cache.blocks] == [11]


@torch.no_grad()
def test_what_cannot_be_read_in_pieces_is_refused() -> None:
    for name in ("jamba", "falcon_h1", "glm_moe_dsa"):
        with pytest.raises(UnsupportedArchitectureError, match=f"{name}: layer . keeps a"):
            read_prefix(tiny_loaded(name), token_ids())
    loaded = tiny_loaded("llama")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        read_prefix(loaded, token_ids()[:, :8]).logits(token_ids()[:, 8:], NaNs())


def test_learned_positions_end_and_rotated_ones_do_not() -> None:
    check_positions(tiny_loaded("gpt2"), 64)
    with pytest.raises(ModelError, match="gpt2 has 64 positions, but 65 tokens"):
        check_positions(tiny_loaded("gpt2"), 65)
    check_positions(tiny_loaded("llama"), 65)
