"""A saved `eigen` codec comes back bit for bit, and a damaged one is refused naming the file and what is wrong."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS, Damage, assert_refused, at, card, put, tensors
from eigencache.codec.base import EncodedBytes
from eigencache.codec.byte_ledger import ledger
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_features import EmbeddingFeatures
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Basis, JointTransform
from eigencache.codec.layout import Layout, Part
from eigencache.codec.saved.card import CodecOrigin
from eigencache.codec.saved.eigen import EigenCard, EigenCardSettings
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec, save_codec
from eigencache.errors import CodecError, ForeignContainerError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_basis import JointScope, spans_of
from eigencache.records.fit import Expected
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation

SCOPES: tuple[JointScope, ...] = ("head", "layer", "kind", "joint")
LAYERS, HEADS, KEYS, VALUES = 2, 2, 4, 6  # numbers of a key and of a value
EXPECTED = Expected(
    context=512,
    bits_per_value=1.25,
    coded_bits=33.3,
    tokens=4000,
    delta_nll=0.01,
    delta_nll_interval=(-0.005, 0.02),
    kl=0.02,
    top1_agreement=0.95,
)
VOCABULARY, EMBEDDING, FEATURES, RANK, PLACES = 11, 5, 3, 2, 2
EMBEDDINGS = torch.randn(VOCABULARY, EMBEDDING, generator=torch.Generator().manual_seed(7))
Cached = dict[int, tuple[Tensor, Tensor]]


def planted(
    scope: JointScope = "joint",
    *,
    text: bool = True,
    metric: bool = True,
    rank: int = 3,
    kept: SinksAndWindow = SinksAndWindow(2, 3, 8),  # noqa: B008 - frozen
    pairing: Pairing = "half",
    seed: int = 0,
) -> EigenCodec:
    """All tensors drawn; the first basis has no coefficient where there are several."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parts = [Part(i, slot, (0, HEADS), (KEYS, VALUES)[slot]) for slot in (0, 1) for i in range(LAYERS)]
    rotation = Rotation(10.0 ** (-torch.arange(KEYS // 2, dtype=torch.float64)), 1.1, pairing)
    layout = Layout(tuple(parts), dict.fromkeys(range(LAYERS), (0, rotation)))
    spans = spans_of(layout, scope)
    bases = tuple(Basis.of(a, drawn(rank if a or len(spans) == 1 else 0, b - a)) for a, b in spans)
    squares = [drawn(HEADS, p.dim, p.dim) for p in parts] if metric else []
    metrics = tuple(m @ m.mT + torch.eye(m.shape[-1]) for m in squares)
    transform = JointTransform(drawn(layout.width), bases, metrics)
    count = transform.coefficients
    symbols = (4 * drawn(count + text, 500)).int().numpy()
    predictor = TokenPredictor(
        EmbeddingFeatures(
            torch.randperm(VOCABULARY, generator=generator).int(),
            drawn(EMBEDDING, FEATURES).half(),
            drawn(FEATURES),
            EMBEDDINGS.__getitem__,
        ),
        drawn(2 * FEATURES, RANK).half(),
        drawn(RANK, layout.width).half(),
        torch.tensor([4], dtype=torch.int32),
        drawn(HEADS * KEYS, PLACES),
        drawn(FEATURES, PLACES),
    )
    return EigenCodec(
        name="planted – ünïcode",
        layout=layout,
        transform=transform,
        step=0.3,
        quantizer=DeadZone(*(torch.linspace(a, b, count) for a, b in ((0.5, 1.2), (-0.2, 0.4), (-0.9, 0.5), (0.0, 0.7)))),
        tables=fit_tables(symbols, np.arange(count + text) // 2),
        lanes=4,
        kept=kept,
        block=16,
        dtype=torch.float32,
        text=predictor if text else None,
    )


def about(codec: EigenCodec, **changed: Any) -> EigenCardSettings:
    said = EigenSettings(
        metric="fisher" if codec.transform.metrics else "frobenius",
        text=codec.text is not None,
        window=codec.kept.window,
        kept_bits=codec.kept.bits,
        block=codec.block,
    )
    return EigenCardSettings(**(asdict(said) | changed))


def saved(folder: Path, codec: EigenCodec | None = None, origin: CodecOrigin = ORIGIN) -> Path:
    codec = codec or planted()
    save_codec(folder, codec, about(codec), origin, WINDOWS, EXPECTED)
    return folder


def cache(tokens: int = 60, seed: int = 0) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, HEADS, tokens, KEYS), (1, HEADS, tokens, VALUES))
    return {i: tuple(torch.randn(size, generator=generator) for size in sizes) for i in range(LAYERS)}  # type: ignore[misc]


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
def test_what_is_loaded_writes_the_same_containers(scope: JointScope, text: bool, tmp_path: Path) -> None:
    for metric in (True, False):
        codec = planted(scope, text=text, metric=metric)
        assert_alike(codec, load_codec(saved(tmp_path / "codec", codec)).codec)  # type: ignore[arg-type]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.sampled_from(SCOPES), st.booleans(), st.integers(1, 4), st.integers(0, 5), st.integers(0, 70),
    st.sampled_from([8, 16]), st.sampled_from(PAIRINGS), st.floats(1e-3, 1e3), st.integers(1, 32), st.integers(1, 200),
)  # fmt: skip
def test_any_codec_survives(scope, text, rank, sinks, window, bits, pairing, step, lanes, block) -> None:
    codec = planted(scope, text=text, rank=rank, kept=SinksAndWindow(sinks, window, bits), pairing=pairing, seed=rank)
    codec = replace(codec, step=np.float64(step), lanes=lanes, block=block, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        origin = ORIGIN.model_copy(update={"dtype": "float64"})
        assert_alike(codec, load_codec(saved(Path(folder, "codec"), codec, origin)).codec)  # type: ignore[arg-type]


def test_bases_that_were_fitted_column_by_column_multiply_as_they_are_stored(tmp_path: Path) -> None:
    codec = planted(rank=7)
    turned = lambda x: x.mT.contiguous().mT  # noqa: E731 - used thrice
    t, text = codec.transform, codec.text
    bases = tuple(replace(b, rows=turned(b.rows)) for b in t.bases)
    transform = JointTransform(t.mean, bases, tuple(turned(m) for m in t.metrics))
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
    assert {x.dtype for x in stored.values()} == {torch.float16, torch.float32, torch.float64, torch.int32, torch.int64}
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


def wrapped(starts: Tensor) -> Tensor:
    """Edges whose differences are positive in 32 bits only."""
    starts[0] = 4096
    starts[0, :5] = torch.tensor([0, 2**31 - 1, -(2**31), -1, 4096], dtype=torch.int32)
    return starts


def last_basis(**changed: Any) -> Damage:
    return card(lambda c: c["bases"][-1].update(changed))


CARD_DAMAGES: dict[str, tuple[Damage, str]] = {
    "another kind": (
        card(lambda c: c.update(kind="zip")),
        "kind 'zip' is unknown to this version, which reads eigen, live, pca",
    ),
    "the other kind": (card(lambda c: c.update(kind="pca")), "schema eigencache.codec/1: settings.target: Field required"),
    "another schema": (card(lambda c: c.update(schema_version="eigencache.codec/2")), "should be 'eigencache.codec/1'"),
    "unknown field": (card(lambda c: c.update(extra=1)), "extra: Extra inputs"),
    "no promise": (card(lambda c: c.pop("expected")), "expected: Field required"),
    "half a promise": (card(lambda c: c["expected"].pop("kl")), "expected.kl: Field required"),
    "infinite loss": (card(lambda c: c["expected"].update(delta_nll="inf")), "expected.delta_nll"),
    "more than all": (card(lambda c: c["expected"].update(top1_agreement=1.1)), "expected.top1_agreement"),
    "interval": (card(lambda c: c["expected"].update(delta_nll_interval=[1, 0])), "the expected interval ends before"),
    "scope": (card(lambda c: c["settings"].update(scope="all")), "settings.scope: Input should be 'head', 'layer', 'kind'"),
    "no step": (card(lambda c: c.update(step=0)), "step: Input should be greater than 0"),
    "endless step": (card(lambda c: c.update(step="inf")), "step: Input should be a finite number"),
    "another step": (card(lambda c: c.update(step=0.31)), "describes codec "),
    "no lane": (card(lambda c: c.update(lanes=0)), "lanes: Input should be greater than or equal to 1"),
    "many lanes": (card(lambda c: c.update(lanes=33)), "lanes: Input should be less than or equal to 32"),
    "no block": (card(lambda c: c.update(block=0)), "block: Input should be greater than or equal to 1"),
    "long block": (card(lambda c: c.update(block=2**16)), "block: Input should be less than or equal to 65535"),
    "another block": (card(lambda c: c.update(block=17)), "text, kept tokens or block are not what the settings say"),
    "kept bits": (card(lambda c: c["kept"].update(bits=4)), "kept.bits: Input should be 16 or 8"),
    "no hash": (card(lambda c: c.update(codec_sha256="1")), "codec_sha256: String should match pattern"),
    "another hash": (card(lambda c: c.update(codec_sha256="1" * 64)), "not 111111111111 as it says"),
    "no parts": (card(lambda c: c.update(parts=[])), "parts: List should have at least 1 item"),
    "part twice": (card(lambda c: c["parts"].append(c["parts"][0])), "do not cover the heads of layer 0, slot 0 once each"),
    "slot lost": (card(lambda c: c["parts"].pop()), "layer 1 has no slot 1"),
    "rotated twice": (card(lambda c: c["rotations"][1].update(layer_idx=0)), "a layer is rotated twice"),
    "too many pairs": (card(lambda c: c["rotations"][0].update(pairs=3)), "layer 0, slot 0 has no 3 pairs"),
    "no bases": (card(lambda c: c.update(bases=[])), "bases: List should have at least 1 item"),
    "overlap": (last_basis(start=33), "the bases do not cover columns 0 to 40 one after the other"),
    "gap": (last_basis(start=35), "the bases do not cover columns 0 to 40 one after the other"),
    "short": (last_basis(stop=39), "the bases do not cover columns 0 to 40 one after the other"),
    "backward": (last_basis(stop=34), "the bases do not cover columns 0 to 40 one after the other"),
    "swapped": (card(lambda c: c["bases"].reverse()), "the bases do not cover columns 0 to 40 one after the other"),
    "too many": (last_basis(coefficients=7), "a basis of 6 columns has 7 coefficients"),
    "none": (card(lambda c: [b.update(coefficients=0) for b in c["bases"]]), "no basis has a coefficient"),
    "no text": (card(lambda c: c.update(text=None)), "text, kept tokens or block are not what the settings say"),
    "wide finder": (card(lambda c: c["text"].update(columns=41)), "tokens are searched for in 41 columns of 40"),
}
TENSOR_DAMAGES: dict[str, tuple[Damage, str]] = {
    "no file": (lambda folder: (folder / TENSORS).unlink(), "cannot be read (No such file"),
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "does not match card.json"),
    "lost": (tensors(lambda t: t.pop("basis.3.scale")), "tensor basis.3.scale is missing"),
    "metric lost": (tensors(lambda t: t.pop("metric.2")), "tensor metric.2 is missing"),
    "metric added": (card(lambda c: c["settings"].update(metric="frobenius")), "tensor metric.0 is not of this codec"),
    "unknown": (tensors(lambda t: t.update(x=torch.zeros(1))), "tensor x is not of this codec"),
    "dtype": (put("basis.1.rows", Tensor.float), "basis.1.rows is torch.float32 [3, 4], the card says torch.float16 [3, 4]"),
    "tables' dtype": (put("tables.shifts", Tensor.long), "tensor tables.shifts is torch.int64"),
    "metric's shape": (put("metric.0", lambda x: x[:1]), "tensor metric.0 is torch.float32 [1, 4, 4], the card"),
    "mix's shape": (put("text.mix", lambda x: x[:3]), "tensor text.mix is torch.float16 [3, 2], the card says"),
    "few coefficients": (put("quantiser.rest", lambda x: x[1:]), "tensor quantiser.rest is torch.float32 [20], the"),
    "no rank": (put("tables.table_of", lambda x: x[1:]), "tensor tables.table_of is torch.int32 [21], the card says"),
    "windows": (put("calibration.windows", lambda x: x[1:]), "tensor calibration.windows is torch.int64 [2], the card says"),
    "NaN": (at("text.rows", (0, 0), torch.nan), "tensor text.rows holds NaN or infinite values"),
    "infinite": (at("basis.4.scale", 1, torch.inf), "tensor basis.4.scale holds NaN or infinite values"),
    "dead zone": (at("quantiser.dead_zone", 0, 0.4), "tensor quantiser.dead_zone is not within 0.5 and 1.2"),
    "offset": (at("quantiser.offset", 2, 0.5), "tensor quantiser.offset is not within -0.2 and 0.4"),
    "centroid": (at("quantiser.first", 2, 1.5), "tensor quantiser.first is not within -1.0 and 1.0"),
    "no such table": (at("tables.table_of", 2, 99), "entropy tables: a coefficient names a table that does not exist"),
    "negative table": (at("tables.table_of", 2, -1), "entropy tables: a coefficient names a table that does not exist"),
    "half": (at("tables.halves", 0, 128), "entropy tables: a table's width is out of range"),
    "shift": (at("tables.shifts", 0, -1), "entropy tables: a table's width is out of range"),
    "slots": (at("tables.starts", (1, 1), 0), "entropy tables: a table does not fill its slots"),
    "slots that come round": (
        tensors(lambda t: (t["tables.halves"].__setitem__(0, 1), wrapped(t["tables.starts"]))),
        "entropy tables: a table does not fill its slots",
    ),
    "before the first": (at("text.first", 0, -1), "tensor text.first is -1, not within 0 and 32"),
    "token twice": (at("text.order", 0, -1), "tensor text.order does not name each of 11 tokens once"),
    "shift lost": (tensors(lambda t: t.pop("text.shift")), "tensor text.shift is missing"),
    "stored features": (card(lambda c: c["text"].update(embedding=None)), "tensor text.features is missing"),
    "wide embedding": (card(lambda c: c["text"].update(embedding=6)), "tensor text.projection is torch.float16 [5, 3], the"),
    "beyond the last": (at("text.first", 0, 33), "tensor text.first is 33, not within 0 and 32"),
}
DAMAGES = {(CARD, n): d for n, d in CARD_DAMAGES.items()} | {(TENSORS, n): d for n, d in TENSOR_DAMAGES.items()}


@pytest.mark.parametrize(("at_fault", "damage"), DAMAGES.items(), ids=[" ".join(key) for key in DAMAGES])
def test_a_damaged_codec_is_refused_naming_the_file_and_what_is_wrong(
    at_fault: tuple[str, str], damage: tuple[Damage, str], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "codec", planted("head"))
    change, says = damage
    change(folder)
    assert_refused(folder, at_fault[0], says)


def test_a_number_of_any_tensor_that_is_another_is_refused(tmp_path: Path) -> None:
    """Even where the card was made to agree with the file: the codec names itself."""
    folder = saved(tmp_path / "codec", planted("head"))
    names = [name for name, x in load_file(folder / TENSORS).items() if x.is_floating_point() and x.numel()]
    assert len(names) > 20
    for name in names:
        saved(folder, planted("head"))
        tensors(lambda t, name=name: t[name].view(-1)[-1].mul_(0.99))(folder)
        with pytest.raises(CodecError, match="describes codec "):
            load_codec(folder)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    good = planted()
    t, q = good.transform, good.quantizer
    bad: dict[str, tuple[EigenCodec, EigenCardSettings]] = {
        "lanes: Input should be less": (replace(good, lanes=64), about(good)),
        "step: Input should be a finite": (replace(good, step=np.inf), about(good)),
        "tensor metric.0 is missing": (replace(good, transform=replace(t, metrics=())), about(good)),
        "tensor metric.0 is not of this": (good, about(good, metric="frobenius")),
        "are not what the settings say": (good, about(good, sinks=5)),
        "tensor mean holds NaN": (replace(good, transform=replace(t, mean=t.mean * np.nan)), about(good)),
        "dead_zone is not within": (replace(good, quantizer=replace(q, dead_zone=q.dead_zone * 9)), about(good)),
        "describes codec ": (replace(good, dtype=torch.float16), about(good)),  # the origin says float32
    }
    for says, (codec, settings_of) in bad.items():
        with pytest.raises(CodecError, match=f"planted – ünïcode: cannot be saved: .*{says}"):
            save_codec(tmp_path / "codec", codec, settings_of, ORIGIN, WINDOWS, EXPECTED)
    with pytest.raises(CodecError, match="cannot be saved: expected: Field required"):
        save_codec(tmp_path / "codec", good, about(good), ORIGIN, WINDOWS)
    assert not list(tmp_path.iterdir())


def test_a_codec_and_a_container_of_an_earlier_release_are_read() -> None:
    """Frozen files, never written again: what they decode to is part of the format."""
    folder = Path(__file__).parent / "saved_codecs"
    codec = load_codec(folder / "eigen").codec
    assert isinstance(codec, EigenCodec)
    blob, expected = (folder / "eigen.ekv").read_bytes(), load_file(folder / "eigen-decoded.safetensors")
    for tokens in (slice(None), slice(20, 45)):
        decoded = codec.decode(EncodedBytes((blob,), 0, 60), tokens)
        for i, both in decoded.items():
            for slot, x in enumerate(both):
                torch.testing.assert_close(x, expected[f"{i}.{slot}"][:, :, tokens], rtol=0, atol=1e-5)
