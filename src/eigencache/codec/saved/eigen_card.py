"""The card of a saved `EigenCodec`: the sizes of its parts, and whether they fit together."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from eigencache.codec.saved.card import SHA256, BlockTokens, CardPart, CodecCard, Count32, NonNegative, Positive
from eigencache.codec.saved.layouts import layout_fault
from eigencache.kernels.rans.cpu import MAX_LANES
from eigencache.records.base import Record
from eigencache.records.fit import Expected


class EigenCardSettings(Record):
    """Settings of the fit. `sinks` None: four first positions, or more where they are detected."""

    scope: Literal["head", "layer", "groups", "joint"]
    group: PositiveInt  # layers of a stage at scope `groups`
    metric: str
    alpha: NonNegative  # power of the metric
    text: bool  # whether vectors are predicted from tokens
    sinks: Count32 | None
    window: Count32
    kept_bits: Literal[16, 8]
    block: BlockTokens
    amortize: PositiveInt  # stored tokens that share the side information


class CardStage(Record):
    """The coefficients of columns start … stop − 1."""

    start: NonNegativeInt
    stop: PositiveInt
    fine: NonNegativeInt  # coefficients whose rows have 16 bits
    coarse: NonNegativeInt  # coefficients whose rows have 8 bits
    predicted: bool  # from the stage before


class CardKept(Record):
    """The tokens that are stored raw."""

    sinks: Count32
    window: Count32
    bits: Literal[16, 8]


class CardText(Record):
    """Sizes of the token predictor."""

    vocabulary: Annotated[int, Field(ge=1, le=2**24)]
    features: PositiveInt  # of a token
    embedding: PositiveInt  # size of the embeddings that are projected
    rank: PositiveInt  # of the prediction of the first stage
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
    stages: Annotated[list[CardStage], Field(min_length=1)]
    metric_dtype: Literal["float16", "float32"] | None  # of the blocks of the metric; None: the Frobenius norm
    step: Positive
    tables: PositiveInt
    lanes: Annotated[int, Field(ge=1, le=MAX_LANES)]
    kept: CardKept
    block: BlockTokens
    text: CardText | None
    positions: CardPositions | None = None

    @property
    def width(self) -> int:
        """Numbers per token."""
        return sum(part.width for part in self.parts)

    @property
    def coefficients(self) -> int:
        """Coefficients per token."""
        return sum(stage.fine + stage.coarse for stage in self.stages)

    def fault(self) -> str | None:
        """Return how the card contradicts itself, or None."""
        if fault := layout_fault(self.parts, self.rotations):
            return fault
        slots = {(part.layer_idx, part.slot) for part in self.parts}
        for layer_idx, slot in sorted(slots):
            if (layer_idx, 1 - slot) not in slots:
                return f"layer {layer_idx} has no slot {1 - slot}"
        width = self.width
        edges = [0, *(stage.stop for stage in self.stages)]
        if (
            [stage.start for stage in self.stages] != edges[:-1]
            or edges[-1] != width
            or any(a >= b for a, b in pairwise(edges))
        ):
            return f"the stages do not cover columns 0 to {width} one after the other"
        for stage in self.stages:
            if stage.fine + stage.coarse > stage.stop - stage.start:
                return f"a stage of {stage.stop - stage.start} columns has {stage.fine + stage.coarse} coefficients"
        if self.stages[0].predicted:
            return "the first stage is predicted from a stage before it"
        if not self.coefficients:
            return "no stage has a coefficient"
        if (self.metric_dtype is None) != (self.settings.metric == "frobenius"):
            return f"the metric {self.settings.metric} has blocks of dtype {self.metric_dtype}"
        if self.text and self.text.columns > width:
            return f"tokens are searched for in {self.text.columns} columns of {width}"
        s, k = self.settings, self.kept
        chosen = (s.text, k.sinks if s.sinks is None else s.sinks, s.window, s.kept_bits, s.block)
        if chosen != (self.text is not None, k.sinks, k.window, k.bits, self.block):
            return "text, kept tokens or block are not what the settings say"
        interval = self.expected.delta_nll_interval
        return "the expected interval ends before it begins" if interval and interval[0] > interval[1] else None
