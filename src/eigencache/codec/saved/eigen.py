"""Saving an `EigenCodec`: the loaded codec has the same SHA-256, so it reads and writes the same containers."""

import math
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import MAX_HALF, EntropyTables, fault_of
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_digits import digit_count
from eigencache.codec.eigen.token_features import EmbeddingFeatures
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.layout import Layout
from eigencache.codec.saved.eigen_card import CardKept, CardPositions, CardStage, CardText, EigenCard
from eigencache.codec.saved.layouts import (
    card_parts,
    card_rotations,
    frequencies_of,
    frequency_kinds,
    parts_from,
    rotations_from,
)
from eigencache.codec.saved.registry import Fault, SavedKind, TensorKind, Tensors, saved_codec
from eigencache.errors import CodecError

_QUANTIZER, _TABLES, _POSITIONS = (
    tuple(field.name for field in fields(part)) for part in (DeadZone, EntropyTables, PositionMeans)
)
_TEXT = tuple(field.name for field in fields(TokenPredictor) if field.name != "features")
_STAGE, _FEATURES = ("fine", "coarse", "scale"), ("order", "projection", "shift")
_PREDICTION = tuple(field.name for field in fields(Prediction))
_RANGES = {"dead_zone": (0.5, 1.2), "offset": (-0.2, 0.4), "first": (-1.0, 1.0), "rest": (-1.0, 1.0)}  # in steps


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
            "stages": [
                CardStage(
                    start=stage.start,
                    stop=stage.stop,
                    fine=len(stage.fine),
                    coarse=len(stage.coarse),
                    predicted=stage.prediction is not None,
                )
                for stage in codec.transform.stages
            ],
            "metric_dtype": next((str(b.dtype).removeprefix("torch.") for b in codec.transform.inverse_roots), None),
            "step": codec.step,
            "tables": len(codec.tables.halves),
            "lanes": codec.lanes,
            "kept": CardKept(**asdict(codec.kept)),
            "block": codec.block,
            "text": text
            and CardText(
                vocabulary=text.features.vocabulary,
                features=text.features.size,
                embedding=len(text.features.projection),
                rank=len(text.rows),
                columns=len(text.finder),
                places=text.finder.shape[1],
            ),
            "positions": positions and CardPositions(count=len(positions.places), rank=len(positions.rows)),
        }

    def tensors(self, codec: EigenCodec) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""
        tensors = {"mean": codec.transform.mean}
        for i, stage in enumerate(codec.transform.stages):
            tensors |= {f"stage.{i}.{field}": getattr(stage, field) for field in _STAGE}
            if stage.prediction is not None:
                tensors |= {f"prediction.{i}.{field}": getattr(stage.prediction, field) for field in _PREDICTION}
        tensors |= {f"inverse_root.{i}": blocks for i, blocks in enumerate(codec.transform.inverse_roots)}
        tensors |= {f"quantiser.{field}": getattr(codec.quantizer, field) for field in _QUANTIZER}
        tensors |= {f"tables.{field}": torch.from_numpy(getattr(codec.tables, field)) for field in _TABLES}
        if codec.text is not None:
            tensors |= {f"text.{field}": getattr(codec.text, field) for field in _TEXT}
            tensors |= {f"text.{field}": getattr(codec.text.features, field) for field in _FEATURES}
        if codec.positions is not None:
            tensors |= {f"positions.{field}": getattr(codec.positions, field) for field in _POSITIONS}
        return tensors | frequencies_of(codec.layout.rotations)

    def card_fault(self, card: EigenCard) -> Fault:
        """Return how the card contradicts itself, or None."""
        return card.fault()

    def tensor_kinds(self, card: EigenCard) -> dict[str, TensorKind]:
        """Return dtype and shape of every tensor that the card implies."""
        half, single, whole = torch.float16, torch.float32, torch.int32
        width, coefficients = card.width, card.coefficients
        kinds: dict[str, TensorKind] = {"mean": (single, (width,))}
        before = 0
        for i, stage in enumerate(card.stages):
            columns = stage.stop - stage.start
            kinds[f"stage.{i}.fine"] = half, (stage.fine, columns)
            kinds[f"stage.{i}.coarse"] = torch.int8, (stage.coarse, columns)
            kinds[f"stage.{i}.scale"] = single, (stage.fine + stage.coarse,)
            if stage.predicted:
                kinds[f"prediction.{i}.codes"] = torch.int8, (columns, before)
                kinds[f"prediction.{i}.scale"] = single, (columns,)
                kinds[f"prediction.{i}.spread"] = single, (before,)
            before = columns
        if card.metric_dtype is not None:
            dtype = getattr(torch, card.metric_dtype)
            heads = [part.heads[1] - part.heads[0] for part in card.parts]
            kinds |= {f"inverse_root.{i}": (dtype, (heads[i], part.dim, part.dim)) for i, part in enumerate(card.parts)}
        kinds |= {f"quantiser.{field}": (single, (coefficients,)) for field in _QUANTIZER}
        digits = digit_count(card.text.vocabulary) if card.text else 0
        tables = {"table_of": (coefficients + digits,), "starts": (card.tables, 2 * MAX_HALF + 3)}
        kinds |= {f"tables.{field}": (whole, tables.get(field, (card.tables,))) for field in _TABLES}
        if text := card.text:
            kinds["text.order"] = whole, (text.vocabulary,)
            kinds["text.projection"] = half, (text.embedding, text.features)
            kinds["text.shift"] = single, (text.features,)
            kinds["text.mix"] = half, (2 * text.features, text.rank)
            kinds["text.rows"] = half, (text.rank, card.stages[0].stop)
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
            first, last = int(tensors["text.first"]), card.width - card.text.columns
            if not 0 <= first <= last:
                return f"tensor text.first is {first}, not within 0 and {last}"
            if not tensors["text.order"].sort().values.equal(torch.arange(card.text.vocabulary)):
                return f"tensor text.order does not name each of {card.text.vocabulary} tokens once"
        return None

    def codec_from(self, card: EigenCard, tensors: Tensors) -> EigenCodec:
        """Return the codec."""
        stages = [
            Stage(
                stage.start,
                stage.stop,
                *(tensors[f"stage.{i}.{field}"] for field in _STAGE),
                prediction=Prediction(*(tensors[f"prediction.{i}.{field}"] for field in _PREDICTION))
                if stage.predicted
                else None,
            )
            for i, stage in enumerate(card.stages)
        ]
        blocks = [tensors[f"inverse_root.{i}"] for i in range(len(card.parts)) if card.metric_dtype is not None]
        text = None
        if card.text:
            order, projection, shift = (tensors[f"text.{field}"] for field in _FEATURES)
            features = EmbeddingFeatures(order, projection, shift)
            text = TokenPredictor(features, *(tensors[f"text.{field}"] for field in _TEXT))
        return EigenCodec(
            name=card.name,
            layout=Layout(parts_from(card.parts), rotations_from(card.rotations, tensors)),
            transform=StagedTransform(tensors["mean"], tuple(stages), tuple(blocks)),
            step=card.step,
            quantizer=DeadZone(*(tensors[f"quantiser.{field}"] for field in _QUANTIZER)),
            tables=_tables(tensors),
            lanes=card.lanes,
            kept=SinksAndWindow(**card.kept.model_dump()),
            block=card.block,
            dtype=getattr(torch, card.origin.dtype),
            text=text,
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


def _tables(tensors: Tensors) -> EntropyTables:
    return EntropyTables(*(tensors[f"tables.{field}"].numpy() for field in _TABLES))
