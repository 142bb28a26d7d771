"""The card of a saved codec: what all kinds share. Every kind extends `CodecCard` in its own file.

Unknown fields and values out of range are refused when a card is read.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from eigencache.codec.eigen.container_header import MAX_U16, MAX_U32
from eigencache.records.base import Record, StoredRecord
from eigencache.records.run import Corpus, Run
from eigencache.spectral.rope import Pairing

Schema = Literal["eigencache.codec/1"]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count32 = Annotated[int, Field(ge=0, le=MAX_U32)]
BlockTokens = Annotated[int, Field(ge=1, le=MAX_U16)]


class CodecOrigin(Record):
    """What a codec was fitted on. It works with the cache of this model with this rotation, and with no other."""

    model: str
    model_sha256: str
    rope_sha256: str
    dtype: Literal["float32", "float64", "float16", "bfloat16"]  # of the model, and of decoded tensors
    calibration: Corpus
    run: Run


class CardPart(Record):
    """Some heads of one slot of one layer."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    heads: tuple[NonNegativeInt, NonNegativeInt]  # half-open range
    dim: PositiveInt

    @property
    def width(self) -> int:
        """Numbers per token."""
        return (self.heads[1] - self.heads[0]) * self.dim


class CardRotation(Record):
    """The rotation of one slot of one layer; its frequencies are a tensor."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    pairs: PositiveInt
    scale: Positive
    pairing: Pairing


class CardHead(StoredRecord):
    """The fields that decide how the rest of a card is read; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    schema_version: Schema = "eigencache.codec/1"
    kind: str


class CodecCard(StoredRecord):
    """The fields of every card. A kind narrows `kind` and adds `settings` and its own fields."""

    schema_version: Schema = "eigencache.codec/1"
    kind: str
    name: str
    origin: CodecOrigin
    tensors_sha256: SHA256  # of the file of tensors
    rotations: list[CardRotation]
    windows: NonNegativeInt  # number of hashes of the calibration text, which detect overlap
    card_sha256: SHA256 | None = None  # of the rest of the card; None in cards of earlier versions
