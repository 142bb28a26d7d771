"""`eigen`: one transform in the metric of what an error costs, one step, static entropy tables, blocks that decode alone.

Per token the keys before rotation and the values of all layers stand in one vector x. y = Uᵀ M^{1/2} (x − μ) is quantized
with one step for every coefficient of every layer (THEORY 5, 6), and the integers are coded with static tables (7). What
is kept of a sequence is one container (docs/format.md): first tokens and a recent window raw, the rest in blocks.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from eigencache.codec.base import Cached, EncodedBytes, length_of
from eigencache.codec.eigen.container import Container, ContainerHeader, Reader, write
from eigencache.codec.eigen.entropy_coder import RansCoder
from eigencache.codec.eigen.entropy_tables import EntropyTables
from eigencache.codec.eigen.position_means import PositionMeans
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.raw_tokens import raw_bytes, raw_nbytes, raw_vectors
from eigencache.codec.eigen.token_features import Embed
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import JointTransform
from eigencache.codec.layout import Layout, Slots, by_layer
from eigencache.codec.sinks_and_window import FIRST_EXACT, middle_of
from eigencache.errors import CodecError
from eigencache.kernels.rans.backend import Backend, choose_backend

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True)
class SinksAndWindow:
    """What is not transformed: first positions and most recent tokens, in 16 or 8 bits."""

    sinks: int = FIRST_EXACT
    window: int = 0
    bits: Literal[16, 8] = 16


@dataclass(frozen=True, eq=False)
class EigenCodec:
    """A fitted codec. `step`: of all coefficients, in the metric's unit; `block`: tokens that decode together.

    With `text`, the first rows of a block's integers are the digits of its tokens. `dtype`: the model's.
    `backend` decodes (kernels/rans/backend.py); whichever it is, the integers are the same.
    """

    name: str
    layout: Layout
    transform: JointTransform
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
        """A plain number for a step: what another one is written as would make another SHA-256."""
        object.__setattr__(self, "step", float(self.step))

    @property
    def nbytes(self) -> int:
        """Bytes of what is held once, as it is saved: transform, what predicts, quantizer and tables."""
        return sum(t.nbytes for t in self._tensors()) + sum(a.nbytes for a in self._arrays())

    @cached_property
    def sha256(self) -> bytes:
        """Of all that decides what bytes mean: a container names the codec that wrote it by this."""
        columns = [(basis.start, basis.stop) for basis in self.transform.bases]
        said = (self.layout.parts, columns, self.step, self.lanes, self.kept, self.block, str(self.dtype), self.text is None)
        text = repr(said if self.positions is None else (*said, self.positions.places.shape))
        digest = sha256(text.replace("SinksAndWindow(", "Kept(").encode())  # its name when the format was frozen
        for layer_idx, (slot, rotation) in sorted(self.layout.rotations.items()):
            digest.update(repr((layer_idx, slot, rotation.scale, rotation.pairing)).encode())
            digest.update(rotation.frequencies.cpu().numpy().astype("<f8").tobytes())
        for tensor in self._tensors():
            digest.update(tensor.detach().cpu().numpy().tobytes())
        for array in self._arrays():
            digest.update(array.astype("<i4").tobytes())
        return digest.digest()

    def to(self, device: str | torch.device) -> "EigenCodec":
        """The same with its tensors where the cache is; tables stay with the CPU, which encodes."""
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
        """The same for a model that `embed` asks for embeddings [n, d] of token ids [n], where it predicts from them."""
        if self.text is None:
            return self
        return replace(self, text=replace(self.text, features=self.text.features.of_model(embed)))

    def encode(self, cached: Cached, start: int = 0) -> EncodedBytes:
        """One container per row of the batch. A sliding-window layer may hold the last tokens only.

        Raises `CodecError` for a cache of other shapes than the codec was fitted for, and for NaN.
        """
        self.layout.require_all(cached)
        tokens = length_of(cached)
        sinks, stop = middle_of(tokens, start, self.kept.sinks, self.kept.window)
        lacking = {i: tokens - keys.shape[2] for i, (keys, _) in cached.items() if keys.shape[2] < tokens}
        x = self._stored(cached, start)
        if not x.isfinite().all():  # a head without coefficients would hide it
            raise CodecError("the cache holds NaN or infinite numbers")
        lacking_coded = {i: count - sinks for i, count in lacking.items() if count > sinks}
        symbols = self._symbols(self._completed(x[:, sinks:stop], lacking_coded)).cpu().numpy()
        header = ContainerHeader(
            self.sha256, start, tokens, sinks, tokens - stop, self.kept.bits, self.block, tuple(sorted(lacking.items()))
        )
        ends = [self._kept(cached, span, tokens) for span in (range(sinks), range(stop, tokens))]

        def row(index: int) -> bytes:
            first, last = ([raw_bytes(end[index], self._heads, self.kept.bits)] if end.shape[1] else [] for end in ends)
            blocks = range(0, symbols.shape[1], self.block)
            coded = _parallel(lambda at: self._coder.encode(symbols[index, at : at + self.block].T), blocks)
            return write(Container(**vars(header), sections=(*first, *coded, *last)))

        return EncodedBytes(tuple(row(index) for index in range(len(x))), start, tokens)

    def decode(self, encoded: EncodedBytes, tokens: slice = slice(None)) -> dict[int, tuple[Tensor, Tensor]]:
        """The cache's tensors [batch, heads, seq, dim] in the model's dtype; of `tokens` only, where they are given.

        Only blocks that hold one of `tokens`, counted from the container's first, are looked at. Raises `CodecError`
        for a container of another codec, for a damaged one, and for rows that are not of the same tokens.
        """
        readers = [Reader(row) for row in encoded.rows]
        for reader in readers:
            reader.header.check_codec(self.sha256)
        if len({reader.header for reader in readers}) > 1:
            raise CodecError("rows of unlike stretches cannot be decoded together: decode them one by one")
        header = readers[0].header
        self._require_own(header)
        if not isinstance(tokens, slice):
            raise CodecError(f"tokens {tokens!r}: give a slice, such as slice(0, {header.tokens})")
        span = range(header.tokens)[tokens]
        if span.step != 1 or not span:
            raise CodecError(
                f"tokens {tokens}: of {header.tokens}, a stretch of neighbors can be decoded: give a slice without a step "
                f"that holds at least one of tokens 0 to {header.tokens - 1}"
            )
        slots = by_layer(self._slots(readers, span), self.dtype)
        lacking = {i: max(0, count - span.start) for i, count in header.absent}
        return {i: (k[:, :, lacking.get(i, 0) :], v[:, :, lacking.get(i, 0) :]) for i, (k, v) in slots.items()}

    def _require_own(self, header: ContainerHeader) -> None:
        """Raises `CodecError` for a header that this codec does not write: blocks of other sizes decode to other numbers."""
        sinks, stop = middle_of(header.tokens, header.start, self.kept.sinks, self.kept.window)
        own = {"block": self.block, "kept_bits": self.kept.bits, "sinks": sinks, "window": header.tokens - stop}
        for name, value in own.items():
            if (found := getattr(header, name)) != value:
                raise CodecError(f"{name} is {found} in the container, this codec writes {value}: the container is damaged")

    def nbytes_of(self, tokens: int, coded_bits: float) -> float:
        """Bytes of `tokens` positions from 0 in one container, when a coded token costs `coded_bits` without states."""
        sinks, stop = middle_of(tokens, 0, self.kept.sinks, self.kept.window)
        header = ContainerHeader(bytes(32), 0, tokens, sinks, tokens - stop, self.kept.bits, self.block, ())
        raw = raw_nbytes(sinks + tokens - stop, self._heads, self.kept.bits)
        states = 4 * self.lanes * header.block_count
        return header.header_nbytes + raw + states + (stop - sinks) * coded_bits / 8

    def cost(self, row: bytes) -> tuple[int, float]:
        """Return the coded tokens of a container and the bits that one of them cost on average, without states."""
        reader = Reader(row)
        header = reader.header
        tokens = header.tokens - header.window - header.sinks
        if not tokens:
            return 0, 0.0
        coded = [len(reader.section(i)) for i in header.sections_of(range(header.sinks, header.sinks + tokens))]
        return tokens, 8 * (sum(coded) - 4 * self.lanes * len(coded)) / tokens

    def _kept(self, cached: Cached, span: range, tokens: int) -> Tensor:
        """Vectors of a few tokens as the cache holds them; what a layer does not hold of them is zero."""
        if not span:
            return self.transform.mean.new_zeros(len(next(iter(cached.values()))[0]), 0, self.layout.width)
        behind = tokens - span.stop

        def end(x: Tensor) -> Tensor:
            return x[:, :, : x.shape[2] - behind][:, :, -len(span) :]

        ends = {i: (end(keys), end(values)) for i, (keys, values) in cached.items()}
        return Layout(self.layout.parts, {}).vectors(ends, span.start, torch.zeros_like(self.transform.mean)).to(self.dtype)

    def _stored(self, cached: Cached, start: int) -> Tensor:
        """Vectors [batch, seq, width] of a cache without what positions add."""
        return self.layout.vectors(cached, start, self.transform.mean) - self._from_position(start, length_of(cached))

    def _from_position(self, start: int, tokens: int) -> Tensor | float:
        """What positions start, start + 1, … add to vectors: [tokens, width]."""
        return 0.0 if self.positions is None else self.positions.at(torch.arange(start, start + tokens))

    def _expected(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Digits of the tokens of vectors x, if they are coded, and what is expected of x without coefficients."""
        if self.text is None:
            return None, self.transform.mean
        ranks = self.text.find(x - self.transform.mean)
        return self.text.digits.split(ranks), self.transform.mean + self.text.predict(ranks, self.block)

    def _completed(self, x: Tensor, lacking: Mapping[int, int]) -> Tensor:
        """x with what layers lack of their first tokens replaced by what the other layers let expect of it.

        Where the same layers are absent, the coefficients are the likeliest ones, given the present columns in the metric
        and how far the tables let a coefficient vary.
        """
        if not lacking:
            return x
        expected = self._expected(x)[1].expand_as(x)
        spread = torch.from_numpy(self.tables.variances()[-self.transform.coefficients :]).to(x)
        prior = torch.diag(1 / (12 * spread))  # an integer's rounding over what the coefficient varies by
        rows = self.transform.decode(torch.eye(self.transform.coefficients, device=x.device), self.step)
        for first, stop in pairwise(sorted({0, *lacking.values()})):
            present = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
            for columns, part in zip(self.layout.spans, self.layout.parts, strict=True):
                present[slice(*columns)] = lacking.get(part.layer_idx, 0) <= first
            gram = self.transform.encode(rows * present, self.step)
            known = (x[:, first:stop] - expected[:, first:stop]) * present
            fitted = self.transform.encode(known, self.step)
            y = torch.linalg.solve(gram.mT + prior, fitted.mT).mT
            again = expected[:, first:stop] + self.transform.decode(y, self.step)
            x[:, first:stop] = torch.where(present, x[:, first:stop], again)
        return x

    def _symbols(self, x: Tensor) -> Tensor:
        """Integers int32 [batch, seq, rows] of vectors [batch, seq, width]: digits of tokens, if any, and coefficients."""
        digits, expected = self._expected(x)
        q = self.quantizer.quantize(self.transform.encode(x - expected, self.step))
        return q if digits is None else torch.cat([digits, q], -1)

    def _vectors(self, symbols: Tensor) -> Tensor:
        """Vectors [batch, seq, width] of integers, of which the first is the first of a block."""
        predicted = self.transform.mean
        if self.text is not None:
            digits = self.text.digits
            ranks, symbols = digits.joined(symbols[..., : digits.count]), symbols[..., digits.count :]
            predicted = predicted + self.text.predict(ranks, self.block)
        return predicted + self.transform.decode(self.quantizer.dequantize(symbols), self.step)

    @cached_property
    def _coder(self) -> RansCoder:
        return RansCoder(self.tables, self.lanes)

    @cached_property
    def _heads(self) -> list[int]:
        return [part.dim for part in self.layout.parts for _ in range(*part.heads)]

    def _slots(self, readers: list[Reader], span: range) -> Slots:
        """The slots of `span`, all rows: sinks, what was coded, and window, one after the other."""
        header = readers[0].header
        edges = (0, header.sinks, header.tokens - header.window, header.tokens)
        pieces = []
        for role, whole in zip((self._raw, self._decoded, self._raw), map(range, edges, edges[1:]), strict=True):
            shared = range(max(whole.start, span.start), min(whole.stop, span.stop))
            if shared:
                pieces.append(role(readers, shared))
        return {at: torch.cat([piece[at].to(self.dtype) for piece in pieces], 2) for at in pieces[0]}

    def _raw(self, readers: list[Reader], span: range) -> Slots:
        header = readers[0].header
        (section,) = header.sections_of(span)
        whole, bits = header.tokens_of(section), header.kept_bits
        rows = [raw_vectors(r.section(section), len(whole), self._heads, bits, self.dtype) for r in readers]
        x = torch.stack(rows)[:, span.start - whole.start : span.stop - whole.start].to(self.transform.mean.device)
        return Layout(self.layout.parts, {}).slots(x, header.start + span.start)

    def _decoded(self, readers: list[Reader], span: range) -> Slots:
        header = readers[0].header
        sections = header.sections_of(span)
        places = [(reader, section) for reader in readers for section in sections]
        data = _parallel(lambda at: at[0].section(at[1]), places)
        blocks = self._integers(data, [len(header.tokens_of(section)) for _, section in places])
        symbols = torch.cat(blocks, 1).unflatten(1, (len(readers), -1)).permute(1, 2, 0).to(self.transform.mean.device)
        first = header.tokens_of(sections[0]).start
        x = self._vectors(symbols)[:, span.start - first : span.stop - first]
        start = header.start + span.start
        return self.layout.slots(x + self._from_position(start, len(span)), start)

    def _integers(self, data: list[memoryview], tokens: list[int]) -> list[Tensor]:
        """Blocks int32 [rows, tokens]: where they are to be used from Triton, in memory from the CPU."""
        device = self.transform.mean.device
        if choose_backend(self.backend, device) == "triton":
            from eigencache.kernels.rans.triton import decode_blocks  # Triton is optional

            blocks = decode_blocks(data, tokens, self.tables, self.lanes, device)
            return [block[:, :count] for block, count in zip(blocks, tokens, strict=True)]
        coded = _parallel(lambda at: self._coder.decode(*at), zip(data, tokens, strict=True))
        return [torch.from_numpy(block) for block in coded]

    def _tensors(self) -> Iterable[Tensor]:
        yield from self.transform.tensors()
        q = self.quantizer
        yield from (q.dead_zone, q.offset, q.first, q.rest)
        yield from self.text.tensors() if self.text else ()
        yield from self.positions.tensors() if self.positions else ()

    def _arrays(self) -> tuple[np.ndarray, ...]:
        t = self.tables
        return (t.table_of, t.shifts, t.halves, t.starts)


def _parallel(work: Callable[[_T], _U], items: Iterable[_T]) -> list[_U]:
    """Results in order, on as many threads as torch has: the entropy coder leaves the interpreter's lock."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(work, items))
