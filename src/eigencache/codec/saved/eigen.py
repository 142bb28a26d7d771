"""Saving an `EigenCodec`: the loaded codec has the same SHA-256, so it reads and writes the same containers."""

import math
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import MAX_HALF, EntropyTables, fault_of
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_digits import digit_count
from eigencache.codec.eigen.token_features import EmbeddingFeatures, StoredFeatures
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Basis, JointTransform
from eigencache.codec.layout import Layout
from eigencache.codec.saved.card import (
    SHA256,
    BlockTokens,
    CardPart,
    CodecCard,
    Count32,
    NonNegative,
    Positive,
)
from eigencache.codec.saved.layouts import (
    card_parts,
    card_rotations,
    frequencies_of,
    frequency_kinds,
    layout_fault,
    parts_from,
    rotations_from,
)
from eigencache.codec.saved.registry import Fault, SavedKind, TensorKind, Tensors, saved_codec
from eigencache.errors import CodecError
from eigencache.kernels.rans.cpu import MAX_LANES
from eigencache.records.base import Record
from eigencache.records.fit import Expected

_QUANTIZER, _TABLES, _POSITIONS = (
    tuple(field.name for field in fields(part)) for part in (DeadZone, EntropyTables, PositionMeans)
)
_TEXT = tuple(field.name for field in fields(TokenPredictor) if field.name != "features")
_RANGES = {"dead_zone": (0.5, 1.2), "offset": (-0.2, 0.4), "first": (-1.0, 1.0), "rest": (-1.0, 1.0)}  # in steps


class EigenCardSettings(Record):
    """Settings of the fit. `sinks` None: detected first positions, in later versions at least four."""

    scope: Literal["head", "layer", "kind", "joint"]
    metric: str
    alpha: NonNegative  # power of the metric
    text: bool  # whether vectors are predicted from tokens
    sinks: Count32 | None
    window: Count32
    kept_bits: Literal[16, 8]
    block: BlockTokens


class CardBasis(Record):
    """The number of coefficients of columns start … stop − 1."""

    start: NonNegativeInt
    stop: PositiveInt
    coefficients: NonNegativeInt


class CardKept(Record):
    """The tokens that are stored raw."""

    sinks: Count32
    window: Count32
    bits: Literal[16, 8]


class CardText(Record):
    """Sizes of the token predictor."""

    vocabulary: Annotated[int, Field(ge=1, le=2**24)]
    features: PositiveInt  # of a token
    embedding: PositiveInt | None = None  # size of the embeddings that are projected; None: features are stored
    rank: PositiveInt  # of the prediction
    columns: PositiveInt  # columns of a vector in which tokens are searched for
    places: PositiveInt  # dimensions of the space of that search


class CardPositions(Record):
    """Sizes of the position means."""

    count: Annotated[int, Field(ge=1, le=2**24)]
    rank: PositiveInt


class EigenCard(CodecCard):
    """The card of an `EigenCodec`."""

    kind: Literal["eigen"] = "eigen"  # type: ignore[assignment]
    settings: EigenCardSettings
    expected: Expected
    codec_sha256: SHA256  # by which containers name the codec
    parts: Annotated[list[CardPart], Field(min_length=1)]
    bases: Annotated[list[CardBasis], Field(min_length=1)]
    step: Positive
    tables: PositiveInt
    lanes: Annotated[int, Field(ge=1, le=MAX_LANES)]
    kept: CardKept
    block: BlockTokens
    text: CardText | None
    positions: CardPositions | None = None


@saved_codec("eigen")
class SavedEigen(SavedKind):
    """Tensors of the transform, the quantizer, the entropy tables, the token predictor and the position means."""

    codec, card = EigenCodec, EigenCard

    def entries(self, codec: EigenCodec) -> dict[str, Any]:
        """Return parts, rotations and sizes as fields of the card."""
        text, positions = codec.text, codec.positions
        return {
            "codec_sha256": codec.sha256.hex(),
            "parts": card_parts(codec.layout.parts),
            "rotations": card_rotations(codec.layout.rotations),
            "bases": [CardBasis(start=b.start, stop=b.stop, coefficients=len(b.rows)) for b in codec.transform.bases],
            "step": codec.step,
            "tables": len(codec.tables.halves),
            "lanes": codec.lanes,
            "kept": CardKept(**asdict(codec.kept)),
            "block": codec.block,
            "text": text
            and CardText(
                vocabulary=text.features.vocabulary,
                features=text.features.size,
                embedding=len(text.features.projection) if isinstance(text.features, EmbeddingFeatures) else None,
                rank=len(text.rows),
                columns=len(text.finder),
                places=text.finder.shape[1],
            ),
            "positions": positions and CardPositions(count=len(positions.places), rank=len(positions.rows)),
        }

    def tensors(self, codec: EigenCodec) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""
        tensors = {"mean": codec.transform.mean}
        for i, basis in enumerate(codec.transform.bases):
            tensors |= {f"basis.{i}.rows": basis.rows, f"basis.{i}.scale": basis.scale}
        tensors |= {f"metric.{i}": blocks for i, blocks in enumerate(codec.transform.metrics)}
        tensors |= {f"quantiser.{field}": getattr(codec.quantizer, field) for field in _QUANTIZER}
        tensors |= {f"tables.{field}": torch.from_numpy(getattr(codec.tables, field)) for field in _TABLES}
        if codec.text is not None:
            tensors |= {f"text.{field}": getattr(codec.text, field) for field in _TEXT} | _features_of(codec.text.features)
        if codec.positions is not None:
            tensors |= {f"positions.{field}": getattr(codec.positions, field) for field in _POSITIONS}
        return tensors | frequencies_of(codec.layout.rotations)

    def card_fault(self, card: EigenCard) -> Fault:
        """Return how the card contradicts itself, or None."""
        if fault := layout_fault(card.parts, card.rotations):
            return fault
        slots = {(part.layer_idx, part.slot) for part in card.parts}
        for layer_idx, slot in sorted(slots):
            if (layer_idx, 1 - slot) not in slots:
                return f"layer {layer_idx} has no slot {1 - slot}"
        width = _width(card)
        edges = [0, *(basis.stop for basis in card.bases)]
        if (
            [basis.start for basis in card.bases] != edges[:-1]
            or edges[-1] != width
            or any(a >= b for a, b in pairwise(edges))
        ):
            return f"the bases do not cover columns 0 to {width} one after the other"
        for basis in card.bases:
            if basis.coefficients > basis.stop - basis.start:
                return f"a basis of {basis.stop - basis.start} columns has {basis.coefficients} coefficients"
        if not _coefficients(card):
            return "no basis has a coefficient"
        if card.text and card.text.columns > width:
            return f"tokens are searched for in {card.text.columns} columns of {width}"
        s, k = card.settings, card.kept
        chosen = (s.text, k.sinks if s.sinks is None else s.sinks, s.window, s.kept_bits, s.block)
        if chosen != (card.text is not None, k.sinks, k.window, k.bits, card.block):
            return "text, kept tokens or block are not what the settings say"
        interval = card.expected.delta_nll_interval
        return "the expected interval ends before it begins" if interval and interval[0] > interval[1] else None

    def tensor_kinds(self, card: EigenCard) -> dict[str, TensorKind]:
        """Return dtype and shape of every tensor that the card implies."""
        half, single, whole = torch.float16, torch.float32, torch.int32
        width, coefficients = _width(card), _coefficients(card)
        kinds: dict[str, TensorKind] = {"mean": (single, (width,))}
        for i, b in enumerate(card.bases):
            kinds[f"basis.{i}.rows"] = half, (b.coefficients, b.stop - b.start)
            kinds[f"basis.{i}.scale"] = single, (b.coefficients,)
        if card.settings.metric != "frobenius":
            heads = [part.heads[1] - part.heads[0] for part in card.parts]
            kinds |= {f"metric.{i}": (single, (heads[i], part.dim, part.dim)) for i, part in enumerate(card.parts)}
        kinds |= {f"quantiser.{field}": (single, (coefficients,)) for field in _QUANTIZER}
        digits = digit_count(card.text.vocabulary) if card.text else 0
        tables = {"table_of": (coefficients + digits,), "starts": (card.tables, 2 * MAX_HALF + 3)}
        kinds |= {f"tables.{field}": (whole, tables.get(field, (card.tables,))) for field in _TABLES}
        if text := card.text:
            if text.embedding is None:
                kinds["text.features"] = half, (text.vocabulary, text.features)
            else:
                kinds["text.order"] = whole, (text.vocabulary,)
                kinds["text.projection"] = half, (text.embedding, text.features)
                kinds["text.shift"] = single, (text.features,)
            kinds["text.mix"] = half, (2 * text.features, text.rank)
            kinds["text.rows"] = half, (text.rank, width)
            kinds["text.first"] = whole, (1,)
            kinds["text.finder"] = single, (text.columns, text.places)
            kinds["text.places"] = single, (text.features, text.places)
        if card.positions:
            kinds["positions.places"] = half, (card.positions.count, card.positions.rank)
            kinds["positions.rows"] = half, (card.positions.rank, width)
        return kinds | frequency_kinds(card.rotations)

    def value_fault(self, card: EigenCard, tensors: Tensors) -> Fault:
        """Return which tensor holds values out of range, or None."""
        for field, bounds in _RANGES.items():
            x, (low, high) = tensors[f"quantiser.{field}"], torch.tensor(bounds)
            if ((x < low) | (x > high)).any():
                return f"tensor quantiser.{field} is not within {bounds[0]} and {bounds[1]}"
        if fault := fault_of(_tables(tensors)):
            return f"entropy tables: {fault}"
        if card.text:
            first, last = int(tensors["text.first"]), _width(card) - card.text.columns
            if not 0 <= first <= last:
                return f"tensor text.first is {first}, not within 0 and {last}"
            if card.text.embedding and not tensors["text.order"].sort().values.equal(torch.arange(card.text.vocabulary)):
                return f"tensor text.order does not name each of {card.text.vocabulary} tokens once"
        return None

    def codec_from(self, card: EigenCard, tensors: Tensors) -> EigenCodec:
        """Return the codec."""
        bases = [
            Basis(b.start, b.stop, tensors[f"basis.{i}.rows"], tensors[f"basis.{i}.scale"]) for i, b in enumerate(card.bases)
        ]
        metrics = [tensors[f"metric.{i}"] for i in range(len(card.parts)) if card.settings.metric != "frobenius"]
        return EigenCodec(
            name=card.name,
            layout=Layout(parts_from(card.parts), rotations_from(card.rotations, tensors)),
            transform=JointTransform(tensors["mean"], tuple(bases), tuple(metrics)),
            step=card.step,
            quantizer=DeadZone(*(tensors[f"quantiser.{field}"] for field in _QUANTIZER)),
            tables=_tables(tensors),
            lanes=card.lanes,
            kept=SinksAndWindow(**card.kept.model_dump()),
            block=card.block,
            dtype=getattr(torch, card.origin.dtype),
            text=TokenPredictor(_features_from(card.text, tensors), *(tensors[f"text.{field}"] for field in _TEXT))
            if card.text
            else None,
            positions=PositionMeans(*(tensors[f"positions.{field}"] for field in _POSITIONS)) if card.positions else None,
        )

    def codec_fault(self, card: EigenCard, codec: EigenCodec) -> Fault:
        """Return whether numbers differ from those that were saved, though they are in range."""
        actual = codec.sha256.hex()
        return (
            None
            if actual == card.codec_sha256
            else f"describes codec {actual[:12]}, not {card.codec_sha256[:12]} as it says"
        )

    def payload_nbytes(self, codec: EigenCodec, tokens: int, values_per_token: int, coded_bits: float | None) -> int:
        """Return the expected bytes of one container, rounded up."""
        if coded_bits is None:
            raise CodecError(f"{codec.name}: `coded_bits` is required, because the bytes of this codec depend on the text")
        return math.ceil(codec.nbytes_of(tokens, coded_bits))

    def coded_bits(self, card: EigenCard) -> float | None:
        """Return the bits of a coded token that were measured at fitting."""
        return card.expected.coded_bits


def _features_of(features: EmbeddingFeatures | StoredFeatures) -> dict[str, Tensor]:
    if isinstance(features, StoredFeatures):
        return {"text.features": features.table}
    return {"text.order": features.order, "text.projection": features.projection, "text.shift": features.shift}


def _features_from(card: CardText, tensors: Tensors) -> EmbeddingFeatures | StoredFeatures:
    if card.embedding is None:
        return StoredFeatures(tensors["text.features"])
    return EmbeddingFeatures(tensors["text.order"], tensors["text.projection"], tensors["text.shift"])


def _tables(tensors: Tensors) -> EntropyTables:
    return EntropyTables(*(tensors[f"tables.{field}"].numpy() for field in _TABLES))


def _width(card: EigenCard) -> int:
    return sum(part.width for part in card.parts)


def _coefficients(card: EigenCard) -> int:
    return sum(basis.coefficients for basis in card.bases)
