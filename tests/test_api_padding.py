"""Rows of padded batches are encoded as the text alone is; what costs far more than the fit is an error that explains."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import eigencache
from eigencache.api import CacheCodec
from eigencache.calibration.session import Session
from eigencache.errors import CodecError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import Goal, fit_codec
from stub_codecs import bundled, random_sequences, tiny_loaded
from tiny_models import token_ids

pytestmark = pytest.mark.slow

PADDING, TEXT, MORE = 70, 120, 8


@pytest.fixture(scope="module")
def codec() -> CacheCodec:
    return eigencache.fit("ref-llama", bits=2, tokens=8192, max_length=512)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    loaded = bundled("ref-llama")
    source = "import os\n\n\nclass Reader:\n" + "".join(
        f"    def read_{i}(self, n):\n        return self.data[n - {i}]\n" for i in range(20)
    )
    return loaded.tokenizer(source, return_tensors="pt")["input_ids"][:, : TEXT + MORE]


@torch.no_grad()
def padded(
    codec: CacheCodec, ids: torch.Tensor, counted: bool, padding: int = PADDING
) -> tuple[DynamicCache, dict[str, Any]]:
    """One row of a left-padded batch and what the model was given; `counted`: positions count the padding."""
    tokens = torch.cat([torch.zeros(1, padding, dtype=torch.int64), ids[:, :TEXT]], 1)
    mask = torch.cat([torch.zeros(1, padding), torch.ones(1, TEXT)], 1).long()
    positions = torch.arange(padding + TEXT)[None] if counted else (mask.cumsum(-1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "position_ids": positions}
    return codec.loaded.model(tokens, **given, use_cache=True).past_key_values, given


@torch.no_grad()
def goes_on(codec: CacheCodec, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    return codec.loaded.model(ids[:, TEXT : TEXT + MORE], past_key_values=cache).logits.log_softmax(-1)


@pytest.mark.parametrize("counted", [False, True], ids=["positions from the text on", "positions count the padding"])
def test_a_padded_row_is_encoded_as_the_text_alone(counted: bool, codec: CacheCodec, ids: torch.Tensor) -> None:
    with torch.no_grad():
        alone = codec.loaded.model(ids[:, :TEXT], use_cache=True).past_key_values
    expected, alone_blob = goes_on(codec, ids, copy.deepcopy(alone)), codec.encode(alone)
    row, given = padded(codec, ids, counted)
    blob = codec.encode(row, given["attention_mask"])
    assert blob == codec.encode(row, **given) and len(blob) < 1.05 * len(alone_blob)
    decoded = codec.decode(blob)
    assert decoded.get_seq_length() == TEXT + PADDING * counted and decoded.layers[0].keys.shape[2] == TEXT
    found = goes_on(codec, ids, decoded)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.01


@pytest.mark.parametrize("counted", [False, True])
def test_padding_that_is_taken_for_text_is_an_error_that_explains(
    counted: bool, codec: CacheCodec, ids: torch.Tensor
) -> None:
    row, given = padded(codec, ids, counted)
    wrong = {
        "attention_mask": given["attention_mask"],
        "position_ids": given["position_ids"] + (-PADDING if counted else PADDING),
    }
    cases = [wrong] if counted else [wrong, {}]
    for arguments in cases:
        with pytest.raises(CodecError, match=r"times what the codec was fitted to.*`attention_mask`.*`position_ids`"):
            codec.encode(row, **arguments)
    assert codec.encode(row, **cases[0], force=True)


@torch.no_grad()
def test_random_tokens_are_no_error(codec: CacheCodec) -> None:
    noise = torch.randint(1, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    assert codec.encode(codec.loaded.model(noise, use_cache=True).past_key_values)


def test_a_few_tokens_behind_padding_need_their_positions(codec: CacheCodec, ids: torch.Tensor) -> None:
    row, given = padded(codec, ids, counted=False, padding=1)  # from position 0 or 1 on, all 3 are stored raw
    for layer in row.layers:
        layer.keys, layer.values = layer.keys[:, :, : 1 + 3], layer.values[:, :, : 1 + 3]
    few = {name: x[:, : 1 + 3] for name, x in given.items()}
    with pytest.raises(CodecError, match="3 tokens behind padding do not show at which position they begin"):
        codec.encode(row, few["attention_mask"])
    assert codec.decode(codec.encode(row, **few)).get_seq_length() == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"attention_mask": torch.ones(1, 5)},
            r"`attention_mask` is of shape \[1, 5\], but the cache has 1 row of 190 tokens",
        ),
        ({"attention_mask": torch.ones(190, 1)}, r"`attention_mask` is of shape \[190, 1\]"),
        ({"attention_mask": torch.zeros(1, 190)}, "0 everywhere"),
        ({"attention_mask": torch.arange(190, 0, -1)[None] > 9}, "padding after a token"),
        ({"position_ids": torch.arange(9)[None]}, r"`position_ids` are of shape \[1, 9\]"),
        ({"position_ids": torch.zeros(1, 190, dtype=torch.int64)}, "must increase by 1"),
        ({"position_ids": torch.arange(-1, 189)[None]}, "must increase by 1"),
    ],
)
def test_masks_and_positions_that_do_not_fit_are_refused(arguments: dict, words: str, codec, ids) -> None:
    row, _ = padded(codec, ids, counted=True)
    with pytest.raises(CodecError, match=words):
        codec.encode(row, **arguments)


def test_several_rows_are_refused_with_the_way_to_take_one(codec: CacheCodec, ids: torch.Tensor) -> None:
    with torch.no_grad():
        cache = codec.loaded.model(ids[:, :60].repeat(2, 1), use_cache=True).past_key_values
    with pytest.raises(CodecError, match=r"a cache of 2 rows: .*batch_select_indices\(torch.tensor\(\[0\]\)\)"):
        codec.encode(cache)
    row = copy.deepcopy(cache)
    row.batch_select_indices(torch.tensor([0]))
    assert codec.encode(row)


def test_learned_positions_that_the_fit_did_not_see_are_refused() -> None:
    loaded = tiny_loaded("gpt2")
    fitted = fit_codec(Session(loaded), random_sequences(*[16] * 128), EigenSettings(sinks=1, block=8), Goal.of(bits=5.5))
    codec = CacheCodec(loaded, fitted.codec, fitted)
    with torch.no_grad():
        short, long = (loaded.model(token_ids(1)[:, :n], use_cache=True).past_key_values for n in (16, 20))
    with pytest.raises(CodecError, match=r"20 tokens from position 0 on: .* seen below 16 in the fit: .*`max_length` 20"):
        codec.encode(long)
    assert codec.encode(short) and codec.encode(long, force=True)
