"""A saved `eigen` codec comes back bit for bit, and expects the bytes that its containers take."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from codec_folders import ORIGIN, WINDOWS
from eigencache.codec.base import EncodedBytes
from eigencache.codec.byte_ledger import ledger
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.transform import StagedTransform
from eigencache.codec.saved.eigen_card import EigenCard
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec
from eigencache.errors import CodecError, ForeignContainerError
from eigencache.fitting.eigen_basis import EigenScope
from eigencache.spectral.rope import PAIRINGS
from saved_eigen import EMBEDDINGS, EXPECTED, SCOPES, about, cache, planted, saved


def assert_alike(codec: EigenCodec, other: EigenCodec) -> None:
    other = other.of_model(EMBEDDINGS.__getitem__)
    assert (other.name, other.dtype, other.nbytes, other.sha256) == (codec.name, codec.dtype, codec.nbytes, codec.sha256)
    assert {x.dtype for x in other._tensors()} == {x.dtype for x in codec._tensors()}
    assert np.array_equal(other.tables.slots, codec.tables.slots)
    for tokens, start in ((60, 0), (1, 0), (37, 5)):
        encoded, again = codec.encode(cache(tokens), start), other.encode(cache(tokens), start)
        assert encoded.rows == again.rows
        decoded, once_more = codec.decode(again), other.decode(encoded)
        assert decoded.keys() == once_more.keys()
        assert all(torch.equal(a, b) for i in decoded for a, b in zip(decoded[i], once_more[i], strict=True))


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_loaded_writes_the_same_containers(scope: EigenScope, text: bool, tmp_path: Path) -> None:
    for metric in (torch.float16, torch.float32, None):
        codec = planted(scope, text=text, metric=metric)
        assert_alike(codec, load_codec(saved(tmp_path / "codec", codec)).codec)  # type: ignore[arg-type]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.sampled_from(SCOPES), st.booleans(), st.integers(1, 4), st.integers(0, 4), st.integers(0, 5), st.integers(0, 70),
    st.sampled_from([8, 16]), st.sampled_from(PAIRINGS), st.floats(1e-3, 1e3), st.integers(1, 32), st.integers(1, 200),
)  # fmt: skip
def test_any_codec_survives(scope, text, rank, fine, sinks, window, bits, pairing, step, lanes, block) -> None:
    codec = planted(
        scope, text=text, rank=rank, fine=fine, kept=SinksAndWindow(sinks, window, bits), pairing=pairing, seed=rank
    )
    codec = replace(codec, step=np.float64(step), lanes=lanes, block=block, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        origin = ORIGIN.model_copy(update={"dtype": "float64"})
        assert_alike(codec, load_codec(saved(Path(folder, "codec"), codec, origin)).codec)  # type: ignore[arg-type]


def test_rows_that_were_fitted_column_by_column_multiply_as_they_are_stored(tmp_path: Path) -> None:
    codec = planted("groups", rank=7, fine=3)
    turned = lambda x: x.mT.contiguous().mT  # noqa: E731 - used often
    t, text = codec.transform, codec.text
    first, second = (replace(s, fine=turned(s.fine), coarse=turned(s.coarse)) for s in t.stages)
    second = replace(second, prediction=replace(second.prediction, codes=turned(second.prediction.codes)))
    transform = StagedTransform(t.mean, (first, second), tuple(turned(b) for b in t.inverse_roots))
    features = replace(text.features, projection=turned(text.features.projection))
    text = replace(text, features=features, **{f: turned(getattr(text, f)) for f in ("mix", "rows", "finder", "places")})
    other = replace(codec, transform=transform, text=text)
    assert_alike(other, load_codec(saved(tmp_path / "codec", other)).codec)  # type: ignore[arg-type]
    assert all(x.is_contiguous() for x in other._tensors())


def test_the_card_says_what_it_was_given(tmp_path: Path) -> None:
    codec = planted("head")
    found = load_codec(saved(tmp_path / "codec", codec))
    assert isinstance(found.card, EigenCard)
    assert (found.card.origin, found.card.settings, found.card.expected) == (ORIGIN, about(codec), EXPECTED)
    assert (found.card.kind, found.card.codec_sha256) == ("eigen", codec.sha256.hex())
    assert (found.windows == WINDOWS).all() and found.windows.dtype == np.uint64
    assert EigenCard.load(tmp_path / "codec" / CARD) == found.card
    stored = load_file(tmp_path / "codec" / TENSORS)
    assert {x.dtype for x in stored.values()} == {
        torch.int8,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
    }
    assert sum(x.nbytes for n, x in stored.items() if not n.startswith(("rotation", "calibration"))) == codec.nbytes


def test_its_bytes_at_any_context_are_what_its_card_expects(tmp_path: Path) -> None:
    codec, found = planted(), load_codec(saved(tmp_path / "codec"))
    values = codec.layout.width
    for row in ledger(found.codec, values, (1, 100, 5000), coded_bits=found.coded_bits):
        assert 0 <= row.payload_nbytes - codec.nbytes_of(row.context, EXPECTED.coded_bits) < 1
        assert (row.sixteen_bit_nbytes, row.basis_nbytes) == (2 * values * row.context, codec.nbytes)
    with pytest.raises(CodecError, match="`coded_bits` is required"):
        ledger(found.codec, values)


def test_another_codec_does_not_read_its_containers(tmp_path: Path) -> None:
    other = load_codec(saved(tmp_path / "codec", planted(seed=1))).codec
    with pytest.raises(ForeignContainerError):
        other.decode(planted().encode(cache()))  # type: ignore[arg-type]


def test_a_codec_and_a_container_of_an_earlier_release_are_read() -> None:
    """Frozen files, never written again: what they decode to is part of the format.

    Layers hold values up to 173, and CPUs sum in different orders: what is allowed is a part of a layer's largest value.
    """
    folder = Path(__file__).parent / "saved_codecs"
    blob, expected = (folder / "eigen.ekv").read_bytes(), load_file(folder / "eigen-decoded.safetensors")
    codec = load_codec(folder / "eigen").codec
    assert isinstance(codec, EigenCodec)
    assert all(len(s.fine) and len(s.coarse) for s in codec.transform.stages[1:]) and codec.transform.stages[1].prediction
    codec = codec.of_model(expected["embeddings"].__getitem__)
    for tokens in (slice(None), slice(20, 45)):
        decoded = codec.decode(EncodedBytes((blob,), 0, 60), tokens)
        for i, both in decoded.items():
            for slot, x in enumerate(both):
                right = expected[f"{i}.{slot}"]
                torch.testing.assert_close(x, right[:, :, tokens], rtol=0, atol=1e-6 * float(right.abs().max()))
