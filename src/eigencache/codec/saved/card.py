"""The card of a saved codec: what it was fitted on and for, and what the tensors beside it are; other cards are refused."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from eigencache.codec.eigen.container import MAX_U16, MAX_U32
from eigencache.kernels.rans.cpu import MAX_LANES
from eigencache.records.base import Centered, Record, Scope, StoredRecord
from eigencache.records.fit import Expected
from eigencache.records.run import Corpus, Run
from eigencache.spectral.rope import Pairing

Schema = Literal["eigencache.codec/1"]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count32 = Annotated[int, Field(ge=0, le=MAX_U32)]
BlockTokens = Annotated[int, Field(ge=1, le=MAX_U16)]
KeptBits = Literal[16, 8]
Eights = Annotated[int, Field(ge=0, le=2**20, multiple_of=8)]


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

    @property
    def width(self) -> int:
        """Numbers per token."""
        return (self.heads[1] - self.heads[0]) * self.dim


class CardRotation(Record):
    """How one slot of one layer is rotated; its frequencies are a tensor."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    pairs: PositiveInt
    scale: Positive
    pairing: Pairing


class CardHead(StoredRecord):
    """What decides how the rest of a card is read; other fields are left unread."""

    model_config = ConfigDict(extra="ignore")

    schema_version: Schema = "eigencache.codec/1"
    kind: Literal["pca", "eigen", "live"]


class CodecCard(StoredRecord):
    """What the cards of all kinds say."""

    schema_version: Schema = "eigencache.codec/1"
    kind: str
    name: str
    origin: CodecOrigin
    tensors_sha256: SHA256  # of the file of tensors
    rotations: list[CardRotation]
    windows: NonNegativeInt  # hashes of the calibration text, in which overlap is looked up
    card_sha256: SHA256 | None = None  # of the rest of the card; None in those of earlier versions


class PCACardSettings(Record):
    """What is compressed, and how its bases were found."""

    target: str
    scope: Scope
    frame: Literal["pre", "post"]  # of the keys
    metric: str
    alpha: float  # power of the metric
    centered: Centered
    basis: str
    bits: Literal[16, 8, 4]  # of a stored coefficient
    rank: PositiveInt  # coefficients per group at most
    sinks: Count32 = 0  # first tokens in 16 bits; cards without it have none


class CardGroup(Record):
    """The parts that one transform works on; groups that name the same transform share it."""

    transform: NonNegativeInt
    rank: PositiveInt
    parts: Annotated[list[CardPart], Field(min_length=1)]

    @property
    def width(self) -> int:
        """Numbers per token of all parts."""
        return sum(part.width for part in self.parts)


class PCACard(CodecCard):
    """Everything of a saved `PCACodec` that is no tensor."""

    kind: Literal["pca"] = "pca"  # type: ignore[assignment]
    settings: PCACardSettings
    sinks: Count32 = 0
    groups: Annotated[list[CardGroup], Field(min_length=1)]


class EigenCardSettings(Record):
    """What was chosen at fitting. `sinks` None: the first positions that stood out, in later versions at least four."""

    scope: Literal["head", "layer", "kind", "joint"]
    metric: Literal["frobenius", "attention", "fisher"]
    alpha: NonNegative  # power of the metric
    text: bool  # predicted from the tokens
    sinks: Count32 | None
    window: Count32
    kept_bits: KeptBits
    block: BlockTokens


class CardBasis(Record):
    """Columns start … stop of a vector have so many coefficients."""

    start: NonNegativeInt
    stop: PositiveInt
    coefficients: NonNegativeInt


class CardKept(Record):
    """What is not transformed."""

    sinks: Count32
    window: Count32
    bits: KeptBits


class CardText(Record):
    """Sizes of what predicts from the tokens."""

    vocabulary: Annotated[int, Field(ge=1, le=2**24)]
    features: PositiveInt  # of a token
    embedding: PositiveInt | None = None  # numbers of an embedding that they are made of; None: they are stored
    rank: PositiveInt  # of the prediction
    columns: PositiveInt  # in which tokens are looked for
    places: PositiveInt  # dimensions in which they are told apart


class CardPositions(Record):
    """Sizes of what positions add."""

    count: Annotated[int, Field(ge=1, le=2**24)]
    rank: PositiveInt


class EigenCard(CodecCard):
    """Everything of a saved `EigenCodec` that is no tensor."""

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


class LiveCardSettings(Record):
    """What was chosen at fitting. `sinks` None: first positions that stood out; `reach` None: the model's."""

    alpha: NonNegative  # power of the metric
    shared: PositiveInt  # numbers of heads that share a basis, at most
    sinks: Count32 | None
    window: Count32
    reach: PositiveInt | None = None


class CardBundle(Record):
    """How many digits of some heads' coefficients have 8, 4 and 2 bits, and how many coefficients one of 4 and one of 2."""

    eight: Eights
    four: Eights
    two: Eights
    six: Count32 = 0


class CardHeads(Record):
    """One slot of one layer."""

    layer_idx: NonNegativeInt
    slot: Literal[0, 1]
    heads: PositiveInt
    dim: PositiveInt
    bundles: Annotated[list[CardBundle], Field(min_length=1)]


class LiveCard(CodecCard):
    """Everything of a saved `LiveCodec` that is no tensor."""

    kind: Literal["live"] = "live"  # type: ignore[assignment]
    settings: LiveCardSettings
    expected: Expected
    sinks: Count32
    window: Count32
    reach: PositiveInt | None = None  # positions it was fitted for; None in cards of earlier versions
    slots: Annotated[list[CardHeads], Field(min_length=1)]
