"""The card of a saved codec: what it was fitted on and for, and what the tensors beside it are."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from eigencache.records import Corpus, Record, Run, Scope, StoredRecord
from eigencache.spectral.rope import Pairing


class CodecSettings(Record):
    """What is compressed, and how its bases were found."""

    target: str
    scope: Scope
    frame: Literal["pre", "post"]  # of the keys
    metric: str
    alpha: float  # power of the metric
    centred: bool
    basis: str
    bits: Literal[16, 8, 4]  # of a stored coefficient
    rank: PositiveInt  # coefficients per group at most


class CodecOrigin(Record):
    """What a codec was fitted on: it serves the cache of this model with this rotation, and of no other."""

    model: str
    model_sha256: str
    rope_sha256: str
    dtype: Literal["float32", "float64", "float16", "bfloat16"]  # of the model, and of what is decoded
    calibration: Corpus
    run: Run


class CardPart(Record):
    """Some heads of one slot of one layer."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    heads: tuple[NonNegativeInt, NonNegativeInt]  # from, up to
    dim: PositiveInt


class CardGroup(Record):
    """The parts that one transform works on; groups that name the same transform share it."""

    transform: NonNegativeInt
    rank: PositiveInt
    parts: Annotated[list[CardPart], Field(min_length=1)]

    @property
    def width(self) -> int:
        """Numbers per token of all parts."""
        return sum((part.heads[1] - part.heads[0]) * part.dim for part in self.parts)


class CardRotation(Record):
    """How one slot of one layer is rotated; its frequencies are a tensor."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    pairs: PositiveInt
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    pairing: Pairing


class CodecCard(StoredRecord):
    """Everything of a saved codec that is no tensor."""

    schema_version: Literal["eigencache.codec/1"] = "eigencache.codec/1"
    kind: Literal["pca"] = "pca"
    name: str
    settings: CodecSettings
    origin: CodecOrigin
    tensors_sha256: str  # of the file of tensors
    groups: Annotated[list[CardGroup], Field(min_length=1)]
    rotations: list[CardRotation]
    windows: NonNegativeInt  # hashes of the calibration text, in which overlap is looked up
