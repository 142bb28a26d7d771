"""The stored codec `eigen`: stages in the metric of the loss, one quantization step, static entropy tables, blocks.

The keys before rotation and the values of all layers form one vector per token. Each stage of it is predicted from the
decoded stage before, the first one from the token, and what remains is transformed and quantized with one step for all
coefficients (`transform.py`; THEORY 5, 6). The integers are coded with static tables (THEORY 7). A sequence becomes one
container (docs/format.md): first tokens and a recent window raw, the rest in blocks that decode independently.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import Cached, EncodedBytes, length_of
from eigencache.codec.eigen.container import Container, Reader, write
from eigencache.codec.eigen.container_header import ContainerHeader
from eigencache.codec.eigen.entropy_coder import RansCoder, decode_blocks
from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.codec.eigen.missing_layers import fill_missing
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.raw_tokens import ends_of, raw_bytes, raw_nbytes, raw_slots
from eigencache.codec.eigen.threads import parallel
from eigencache.codec.eigen.token_features import Embed
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import StagedTransform
from eigencache.codec.layout import LastAngles, Layout, Slots, by_layer
from eigencache.codec.sinks_and_window import FIRST_EXACT, middle_of
from eigencache.errors import CodecError
from eigencache.kernels.rans.backend import Backend


@dataclass(frozen=True)
class SinksAndWindow:
    """The tokens that are stored raw: `sinks` first positions and `window` most recent tokens, in 16 or 8 bits."""

    sinks: int = FIRST_EXACT
    window: int = 0
    bits: Literal[16, 8] = 16


@dataclass(frozen=True, eq=False)
class EigenCodec:
    """A fitted codec of one model (`fitting.eigen` fits it).

    Args:
        name: Name in tables.
        layout: Which heads form a vector, and how keys are rotated.
        transform: Vectors ⇄ coefficients.
        step: Quantization step of all coefficients, in the unit of the metric.
        quantizer: Thresholds and reconstruction points of every coefficient.
        tables: Entropy tables. Where tokens are predicted, the first rows of a block are the digits of its tokens.
        lanes: Interleaved states of the entropy coder.
        kept: Which tokens are stored raw, and in how many bits.
        block: Tokens per block.
        dtype: The model's.
        text: Predicts the first stage from tokens; None: no prediction.
        positions: The mean vector of every position, for learned positions; None: no such means.
        backend: What decodes blocks (`kernels/rans/backend.py`); None chooses by the device. The result is the same.
    """

    name: str
    layout: Layout
    transform: StagedTransform
    step: float
    quantizer: DeadZone
    tables: EntropyTables
    lanes: int
    kept: SinksAndWindow
    block: int
    dtype: torch.dtype
    text: TokenPredictor | None = None
    positions: PositionMeans | None = None
    backend: Backend | None = None

    def __post_init__(self) -> None:
        """Make the step a plain float: another type has another `repr`, which would change the SHA-256."""
        object.__setattr__(self, "step", float(self.step))

    @property
    def nbytes(self) -> int:
        """Bytes stored once, as they are saved: transform, predictors, quantizer and tables."""
        return sum(t.nbytes for t in self._tensors()) + sum(a.nbytes for a in self._arrays())

    @cached_property
    def sha256(self) -> bytes:
        """SHA-256 of everything that decides what bytes mean; a container names its codec by it."""
        stages = [(s.start, s.stop, len(s.fine), s.prediction is None) for s in self.transform.stages]
        said = (self.layout.parts, stages, self.step, self.lanes, self.kept, self.block, str(self.dtype), self.text is None)
        digest = sha256(repr((*said, self.positions and self.positions.places.shape)).encode())
        for layer_idx, (slot, rotation) in sorted(self.layout.rotations.items()):
            digest.update(repr((layer_idx, slot, rotation.scale, rotation.pairing)).encode())
            digest.update(rotation.frequencies.cpu().numpy().astype("<f8").tobytes())
        for tensor in self._tensors():
            digest.update(tensor.detach().cpu().numpy().tobytes())
        for array in self._arrays():
            digest.update(array.astype("<i4").tobytes())
        return digest.digest()

    def to(self, device: str | torch.device) -> "EigenCodec":
        """Return the codec with its tensors on `device`; the tables stay on the CPU, which encodes."""
        moved = replace(
            self,
            transform=self.transform.to(device),
            quantizer=self.quantizer.to(device),
            text=self.text and self.text.to(device),
            positions=self.positions and self.positions.to(device),
        )
        moved.__dict__["sha256"] = self.sha256
        return moved

    def of_model(self, embed: Embed) -> "EigenCodec":
        """Return the codec with the embeddings of its model: `embed` maps token ids [n] to embeddings [n, d]."""
        if self.text is None:
            return self
        return replace(self, text=replace(self.text, features=self.text.features.of_model(embed)))

    def encode(self, cached: Cached, start: int = 0) -> EncodedBytes:
        """Encode a cache as one container per row of the batch.

        Args:
            cached: Layer → keys and values [batch, heads, seq, dim]; a sliding-window layer may hold the last tokens only.
            start: Position of the first token.

        Raises:
            CodecError: The cache has other heads than the codec was fitted for, or holds NaN or infinite values.
        """
        self.layout.require_all(cached)
        tokens = length_of(cached)
        sinks, stop = middle_of(tokens, start, self.kept.sinks, self.kept.window)
        missing = {i: tokens - keys.shape[2] for i, (keys, _) in cached.items() if keys.shape[2] < tokens}
        x = self._stored(cached, start)
        if not x.isfinite().all():  # a head without coefficients would hide it
            raise CodecError("the cache holds NaN or infinite values: run the model with `dtype` float32")
        lacking = {i: count - sinks for i, count in missing.items() if count > sinks}
        symbols = self._symbols(x[:, sinks:stop], lacking).cpu().numpy()
        header = ContainerHeader(
            self.sha256, start, tokens, sinks, tokens - stop, self.kept.bits, self.block, tuple(sorted(missing.items()))
        )
        mean, dtype = self.transform.mean, self.dtype
        ends = [ends_of(cached, span, self.layout, dtype, mean.device) for span in (range(sinks), range(stop, tokens))]

        def row(index: int) -> bytes:
            heads = self.layout.head_widths
            first, last = ([raw_bytes(end[index], heads, self.kept.bits)] if end.shape[1] else [] for end in ends)
            blocks = range(0, symbols.shape[1], self.block)
            coded = parallel(lambda token: self._coder.encode(symbols[index, token : token + self.block].T), blocks)
            return write(Container(**vars(header), sections=(*first, *coded, *last)))

        return EncodedBytes(tuple(row(index) for index in range(len(x))), start, tokens)

    def decode(self, encoded: EncodedBytes, tokens: slice = slice(None)) -> dict[int, tuple[Tensor, Tensor]]:
        """Decode containers.

        Args:
            encoded: One container per row of the batch; all hold the same tokens.
            tokens: Which tokens to decode, counted from the container's first; default: all. Only the blocks that hold
                them are read.

        Returns:
            Layer → keys and values [batch, heads, seq, dim] in the model's dtype.

        Raises:
            CodecError: A container is damaged or of another codec, rows hold different tokens, or `tokens` is no
                contiguous slice of them.
        """
        return dict(self.decode_layers(encoded, tokens))

    def decode_layers(
        self, encoded: EncodedBytes, tokens: slice = slice(None)
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Decode containers like `decode`, yielding the layers one by one, each as soon as its stage is decoded.

        A reader can use the first layers while the others are not decoded yet. The containers' headers are checked at the
        call, their sections when the first layer is asked for.
        """
        readers = [Reader(row) for row in encoded.rows]
        for reader in readers:
            reader.header.check_codec(self.sha256)
        if len({reader.header for reader in readers}) > 1:
            raise CodecError("the rows hold different tokens: decode each container by itself")
        header = readers[0].header
        self._require_own(header)
        span = range(header.tokens)[tokens] if isinstance(tokens, slice) else range(0)
        if span.step != 1 or not span:
            raise CodecError(
                f"`tokens` is {tokens}: it must be a non-empty contiguous slice of the {header.tokens} stored tokens, "
                f"such as slice(0, {header.tokens})"
            )
        missing = {i: max(0, count - span.start) for i, count in header.absent}
        return (
            (i, (k[:, :, missing.get(i, 0) :], v[:, :, missing.get(i, 0) :]))
            for slots in self._slots(readers, span)
            for i, (k, v) in by_layer(slots, self.dtype).items()
        )

    def nbytes_of(self, tokens: int, coded_bits: float) -> float:
        """Return the bytes of one container that begins at position 0.

        Args:
            tokens: Its number of tokens.
            coded_bits: Bits of a coded token, without the states of the entropy coder.
        """
        sinks, stop = middle_of(tokens, 0, self.kept.sinks, self.kept.window)
        header = ContainerHeader(bytes(32), 0, tokens, sinks, tokens - stop, self.kept.bits, self.block, ())
        raw = raw_nbytes(sinks + tokens - stop, self.layout.head_widths, self.kept.bits)
        states = 4 * self.lanes * header.block_count
        return header.header_nbytes + raw + states + (stop - sinks) * coded_bits / 8

    def cost(self, row: bytes) -> tuple[int, float]:
        """Return how many tokens of a container are coded, and their average bits without the entropy coder's states."""
        reader = Reader(row)
        header = reader.header
        tokens = header.tokens - header.window - header.sinks
        if not tokens:
            return 0, 0.0
        coded = [len(reader.section(i)) for i in header.sections_of(range(header.sinks, header.sinks + tokens))]
        return tokens, 8 * (sum(coded) - 4 * self.lanes * len(coded)) / tokens

    def _require_own(self, header: ContainerHeader) -> None:
        """Raise `CodecError` for a header that this codec does not write: its blocks would decode to wrong numbers."""
        sinks, stop = middle_of(header.tokens, header.start, self.kept.sinks, self.kept.window)
        expected = {"block": self.block, "kept_bits": self.kept.bits, "sinks": sinks, "window": header.tokens - stop}
        for name, value in expected.items():
            if (found := getattr(header, name)) != value:
                raise CodecError(f"corrupt container: {name} is {found}, this codec writes {value}")

    def _stored(self, cached: Cached, start: int) -> Tensor:
        """Return the vectors [batch, seq, width] of a cache without their position means."""
        return self.layout.vectors(cached, start, self.transform.mean) - self._from_position(start, length_of(cached))

    def _from_position(self, start: int, tokens: int) -> Tensor | float:
        """Return the means of positions start, start + 1, … [tokens, width]."""
        return 0.0 if self.positions is None else self.positions.at(torch.arange(start, start + tokens))

    def _symbols(self, x: Tensor, missing: dict[int, int]) -> Tensor:
        """Return the integers int32 [batch, seq, rows]: digits of the tokens, if they are coded, and coefficients.

        Args:
            x: Vectors [batch, seq, width] of the coded tokens.
            missing: Layer → how many of the first of these tokens it lacks.
        """
        centered = x - self.transform.mean
        ranks = None if self.text is None else self.text.find(centered)
        first = self._first(ranks)
        z = self.transform.weighed(centered)
        if missing:
            variances = 12 * torch.from_numpy(self.tables.variances()[-self.transform.coefficients :]).to(z)
            z = fill_missing(z, first, missing, self.layout, self.transform, variances)
        q = self.transform.quantize(z, self.step, self.quantizer, first)
        return q if self.text is None or ranks is None else torch.cat([self.text.digits.split(ranks), q], -1)

    def _first(self, ranks: Tensor | None) -> Tensor | None:
        """Return what the tokens predict for the first stage."""
        return None if self.text is None or ranks is None else self.text.predict(ranks, self.block)

    @cached_property
    def _coder(self) -> RansCoder:
        return RansCoder(self.tables, self.lanes)

    def _slots(self, readers: list[Reader], span: range) -> Iterator[Slots]:
        """Yield the slots of `span` for all rows, a few layers at a time."""
        header = readers[0].header
        edges = (0, header.sinks, header.tokens - header.window, header.tokens)
        sections = map(range, edges, edges[1:])
        sinks, coded, window = (range(max(s.start, span.start), min(s.stop, span.stop)) for s in sections)
        layout, device = self.layout, self.transform.mean.device
        first, last = (raw_slots(readers, part, layout, self.dtype, device) if part else None for part in (sinks, window))
        for middle in self._decoded(readers, coded) if coded else [None]:
            pieces = [piece for piece in (first, middle, last) if piece is not None]
            yield {key: torch.cat([piece[key].to(self.dtype) for piece in pieces], 2) for key in middle or pieces[0]}

    def _decoded(self, readers: list[Reader], span: range) -> Iterator[Slots]:
        """Yield the slots of coded tokens as soon as all stages of some layers are decoded."""
        header, device = readers[0].header, self.transform.mean.device
        sections = header.sections_of(span)
        jobs = [(reader, section) for reader in readers for section in sections]
        data = parallel(lambda job: job[0].section(job[1]), jobs)
        tokens = [len(header.tokens_of(section)) for _, section in jobs]
        blocks = decode_blocks(self._coder, data, tokens, self.backend, device)
        symbols = torch.cat(blocks, 1).unflatten(1, (len(readers), -1)).permute(1, 2, 0).to(device)
        ranks = None
        if self.text is not None:
            count = self.text.digits.count
            ranks, symbols = self.text.digits.joined(symbols[..., :count]), symbols[..., count:]
        begin = header.tokens_of(sections[0]).start
        shift = self._from_position(header.start + begin, symbols.shape[1])
        wanted = slice(span.start - begin, span.stop - begin)
        start, pending, ends, angles_at = 0, [], self.layout.layer_ends, LastAngles()
        for stage, z in self.transform.dequantized(symbols, self.step, self.quantizer, self._first(ranks)):
            pending.append(z)
            if stage.stop not in ends:
                continue
            columns = slice(start, stage.stop)
            x = self.transform.mean[columns] + self.transform.centered(torch.cat(pending, -1), start)
            if isinstance(shift, Tensor):
                x = x + shift[:, columns]
            yield self.layout.within(start, stage.stop).slots(x[:, wanted], header.start + span.start, angles_at)
            start, pending = stage.stop, []

    def _tensors(self) -> Iterable[Tensor]:
        yield from self.transform.tensors()
        q = self.quantizer
        yield from (q.dead_zone, q.offset, q.first, q.rest)
        yield from self.text.tensors() if self.text else ()
        yield from self.positions.tensors() if self.positions else ()

    def _arrays(self) -> tuple[np.ndarray, ...]:
        t = self.tables
        return (t.table_of, t.shifts, t.halves, t.starts)
