"""A layer is handed from `update` to the attention that belongs to it, once; unread tokens are removed and reported."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eigencache.errors import CodecError
from eigencache.models.live_cache.layer import CompressedLayer
from eigencache.models.live_cache.pending import PendingAttention, pending
from live_codecs import random_layer


def module(layer_idx: int) -> Any:
    return SimpleNamespace(layer_idx=layer_idx)


def updated_layer(tokens: int = 3) -> CompressedLayer:
    layer = random_layer(2, 8)
    layer.update(*torch.ones(2, 1, 2, tokens, 8))
    pending.clear()
    return layer


def test_a_layer_is_taken_once_by_its_own_attention() -> None:
    hand_over, layer = PendingAttention(), updated_layer()
    keys = torch.ones(1, 2, 3, 8)
    hand_over.put(layer)
    assert hand_over.take(module(0), keys) is layer
    assert hand_over.take(module(0), keys) is None
    for other, given in ((module(1), keys), (SimpleNamespace(), keys), (module(0), keys[:, :, :2])):
        hand_over.put(layer)
        assert hand_over.take(other, given) is None  # type: ignore[arg-type]
        assert hand_over.take(module(0), keys) is None


def test_unread_tokens_are_removed_and_the_layer_is_named() -> None:
    hand_over, layer = PendingAttention(), updated_layer()
    hand_over.put(layer)
    with pytest.raises(CodecError, match="layer 0: attention did not read the compressed cache"):
        hand_over.require_taken(layer)
    assert layer.length == 0 and layer.entered == 0
    hand_over.require_taken(layer)


def test_an_unread_layer_of_another_cache_is_no_error() -> None:
    hand_over, layer, other = PendingAttention(), updated_layer(), random_layer(2, 8)
    hand_over.put(layer)
    hand_over.require_taken(other)
    other.owner = layer.owner
    with pytest.raises(CodecError, match="layer 0"):
        hand_over.require_taken(other)
