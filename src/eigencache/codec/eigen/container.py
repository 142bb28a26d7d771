"""The container of one encoded sequence: writing, reading, and one named error per defect.

docs/format.md is the specification. The header consists of fixed fields, a table, an index and a checksum; the sections
follow. Every section has its own checksum, so that a reader reads only the sections it needs. The codec defines what the
bytes of a section mean.
"""

import struct
import zlib
from array import array
from dataclasses import dataclass, replace
from itertools import accumulate

from eigencache.errors import (
    ContainerChecksumError,
    ContainerHeaderError,
    ContainerVersionError,
    ForeignContainerError,
    NotAContainerError,
    OverlongContainerError,
    TruncatedContainerError,
)

BytesLike = bytes | bytearray | memoryview

MAGIC, VERSION = b"\x89EKV", 1
MAX_POSITION = 2**40  # of the token after the last
MAX_HEADER_NBYTES = 2**26
MAX_U16, MAX_U32 = 2**16 - 1, 2**32 - 1

_START = struct.Struct("<4sH")  # magic, version
_FIXED = struct.Struct("<4sHHIIQQHH32s")  # … kept_bits, sinks, window, start, tokens, block, entries of absent, codec_sha256
_ABSENT = struct.Struct("<HQ")  # layer_idx, tokens
_INDEX = struct.Struct("<II")  # length and CRC-32 of a section
_CRC = struct.Struct("<I")  # of all header bytes before it
_RANGES = (
    ("start", 0, MAX_POSITION),
    ("tokens", 0, MAX_POSITION),
    ("sinks", 0, MAX_U32),
    ("window", 0, MAX_U32),
    ("block", 1, MAX_U16),
)


@dataclass(frozen=True)
class ContainerHeader:
    """The header of a container. Tokens and sections are counted from 0; sections are sinks, coded blocks, window.

    Args:
        codec_sha256: The codec that wrote it, 32 bytes.
        start: Position of the first token.
        tokens: Number of tokens.
        sinks: Leading tokens that are stored raw.
        window: Trailing tokens that are stored raw.
        kept_bits: Bits of the numbers of raw tokens, 8 or 16.
        block: Tokens per coded block; the last block may be shorter.
        absent: (layer_idx, how many of the first tokens that layer lacks), ascending by layer_idx.

    Raises:
        ContainerHeaderError: A field is out of range, or fields contradict each other.
    """

    codec_sha256: bytes
    start: int
    tokens: int
    sinks: int
    window: int
    kept_bits: int
    block: int
    absent: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if fault := _fields_fault(self) or _absent_fault(self):
            raise ContainerHeaderError(fault)

    @property
    def block_count(self) -> int:
        """Number of coded blocks between sinks and window."""
        return -(-(self.tokens - self.sinks - self.window) // self.block)

    @property
    def first_block(self) -> int:
        """Index of the section that holds the first coded block."""
        return int(self.sinks > 0)

    @property
    def section_count(self) -> int:
        """Number of sections."""
        return self.first_block + self.block_count + int(self.window > 0)

    @property
    def header_nbytes(self) -> int:
        """Bytes of the header: 72 + 10 per entry of `absent` + 8 per section."""
        return _header_nbytes(len(self.absent), self.section_count)

    def tokens_of(self, section: int) -> range:
        """Return the tokens of a section. Raises `IndexError` for a section that does not exist."""
        self.check_section(section)
        end = self.tokens - self.window
        if section < self.first_block:
            return range(self.sinks)
        if section == self.first_block + self.block_count:
            return range(end, self.tokens)
        first = self.sinks + (section - self.first_block) * self.block
        return range(first, min(first + self.block, end))

    def blocks_of(self, tokens: slice | range) -> range:
        """Return the coded blocks, counted from 0, that hold any of the tokens; block 0 is section `first_block`.

        Args:
            tokens: A slice, which is cut to the container as Python cuts slices, or a range within it.

        Raises:
            IndexError: A range reaches beyond the container.
            ValueError: The step is not 1.
        """
        span = self._span(tokens)
        first, stop = max(span.start, self.sinks), min(span.stop, self.tokens - self.window)
        if not span or first >= stop:
            return range(0)
        return range((first - self.sinks) // self.block, (stop - 1 - self.sinks) // self.block + 1)

    def sections_of(self, tokens: slice | range) -> range:
        """Return the sections that hold any of the tokens; `tokens` and errors are those of `blocks_of`."""
        span = self._span(tokens)
        return range(self._section_of(span[0]), self._section_of(span[-1]) + 1) if span else range(0)

    def check_codec(self, codec_sha256: bytes) -> None:
        """Raise `ForeignContainerError` unless the codec with this hash wrote the container."""
        if self.codec_sha256 != codec_sha256:
            raise ForeignContainerError(
                f"the container was written by codec {self.codec_sha256.hex()[:12]}, expected {codec_sha256.hex()[:12]}: "
                "use the codec that wrote it"
            )

    def check_section(self, section: int) -> None:
        """Raise `IndexError` for a section that does not exist."""
        if not 0 <= section < self.section_count:
            raise IndexError(f"section {section} does not exist: the container has {self.section_count}, counted from 0")

    def _section_of(self, token: int) -> int:
        if token < self.sinks:
            return 0
        if token >= self.tokens - self.window:
            return self.section_count - 1
        return self.first_block + (token - self.sinks) // self.block

    def _span(self, tokens: slice | range) -> range:
        span = range(self.tokens)[tokens] if isinstance(tokens, slice) else tokens
        if span.step != 1:
            raise ValueError(f"`tokens` has a step of {span.step}: use 1")
        if span and not 0 <= span[0] <= span[-1] < self.tokens:
            raise IndexError(f"tokens {span[0]} to {span[-1]}: the container has {self.tokens}, counted from 0")
        return span


@dataclass(frozen=True)
class Container(ContainerHeader):
    """A header and its sections. Raises `ContainerHeaderError` unless there are as many as the header says."""

    sections: tuple[bytes, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sections) != self.section_count:
            raise ContainerHeaderError(
                f"{len(self.sections)} sections, expected {self.section_count} for {self.tokens} tokens, "
                f"{self.sinks} sinks, a window of {self.window} and blocks of {self.block}"
            )
        for i, section in enumerate(self.sections):
            if len(_octets(section)) > MAX_U32:
                raise ContainerHeaderError(
                    f"section {i} is {len(section)} bytes, expected at most {MAX_U32}: use shorter blocks"
                )


def write(container: Container) -> bytes:
    """Return the bytes of a container; they are the same on every machine."""
    c = container
    fields = (c.kept_bits, c.sinks, c.window, c.start, c.tokens, c.block, len(c.absent), c.codec_sha256)
    sections = [_octets(section) for section in c.sections]
    header = b"".join(
        (
            _FIXED.pack(MAGIC, VERSION, *fields),
            *(_ABSENT.pack(*entry) for entry in c.absent),
            *(_INDEX.pack(len(section), zlib.crc32(section)) for section in sections),
        )
    )
    return b"".join((header, _CRC.pack(zlib.crc32(header)), *sections))


def read(data: BytesLike, what: str = "container") -> Container:
    """Read a whole container and verify every checksum.

    Args:
        data: Its bytes.
        what: Name of the data in error messages.

    Raises:
        ContainerError: The class tells the defect (docs/format.md).
        TypeError: `data` is not contiguous bytes.
    """
    reader = Reader(data, what)
    sections = tuple(bytes(reader.section(i)) for i in range(reader.header.section_count))
    return Container(**vars(reader.header), sections=sections)


class Reader:
    """Reads single sections of a container; a damaged section leaves the others readable.

    The header is verified on construction, in the order of docs/format.md; memory is allocated only for an index that the
    data really contains.

    Args:
        data: Bytes of the container; they are not copied and must not change.
        what: Name of the data in error messages.

    Raises:
        ContainerError: The class tells the defect (docs/format.md).
        TypeError: `data` is not contiguous bytes.
    """

    def __init__(self, data: BytesLike, what: str = "container") -> None:
        self._data = _octets(data)
        self._what = what
        self.header = self._read_header()
        self._index = _FIXED.size + _ABSENT.size * len(self.header.absent)
        lengths = (
            length for length, _ in _INDEX.iter_unpack(self._data[self._index : self.header.header_nbytes - _CRC.size])
        )
        self._offsets = array("Q", accumulate(lengths, initial=self.header.header_nbytes))
        self._need(self._offsets[-1], "sections", "fetch or write it again")
        if surplus := len(self._data) - self._offsets[-1]:
            raise OverlongContainerError(
                f"{what}: {len(self._data)} bytes, expected {self._offsets[-1]}: {surplus} bytes follow the last section"
            )

    def section(self, i: int) -> memoryview:
        """Return section i, read-only and not copied.

        Raises:
            ContainerChecksumError: The section is damaged.
            IndexError: There is no such section.
        """
        self.header.check_section(i)
        section = self._data[self._offsets[i] : self._offsets[i + 1]]
        _, expected = _INDEX.unpack_from(self._data, self._index + i * _INDEX.size)
        if (found := zlib.crc32(section)) != expected:
            raise ContainerChecksumError(
                f"{self._what}: section {i} has checksum {found:08x}, expected {expected:08x}: "
                "fetch or write the container again"
            )
        return section

    def _read_header(self) -> ContainerHeader:
        data, what = self._data, self._what
        magic = bytes(data[: len(MAGIC)])
        if not MAGIC.startswith(magic):
            raise NotAContainerError(
                f"{what}: begins with {magic.hex(' ')}, expected {MAGIC.hex(' ')}: it is no encoded sequence"
            )
        self._need(_START.size, "magic and version", "fetch or write it again")
        _, version = _START.unpack_from(data)
        if version != VERSION:
            raise ContainerVersionError(
                f"{what}: version {version}, expected {VERSION}: use a release that reads this version"
            )
        self._need(_FIXED.size, "fixed fields", "fetch or write it again")
        _, _, kept_bits, sinks, window, start, tokens, block, entries, sha256 = _FIXED.unpack_from(data)
        try:
            header = ContainerHeader(sha256, start, tokens, sinks, window, kept_bits, block, absent=())
            nbytes = _header_nbytes(entries, header.section_count)
            if nbytes > MAX_HEADER_NBYTES:
                raise ContainerHeaderError(_header_cap(nbytes))
            self._need(nbytes, "header", f"fetch or write it again (or its first {_FIXED.size} bytes are damaged)")
            (expected,) = _CRC.unpack_from(data, nbytes - _CRC.size)
            if (found := zlib.crc32(data[: nbytes - _CRC.size])) != expected:
                raise ContainerHeaderError(f"header has checksum {found:08x}, expected {expected:08x}")
            table = data[_FIXED.size : _FIXED.size + entries * _ABSENT.size]
            return replace(header, absent=tuple(_ABSENT.iter_unpack(table)))
        except ContainerHeaderError as error:
            raise ContainerHeaderError(f"{what}: {error}: fetch or write it again") from error

    def _need(self, nbytes: int, of: str, remedy: str) -> None:
        if len(self._data) < nbytes:
            raise TruncatedContainerError(
                f"{self._what}: ends after {len(self._data)} bytes, expected {nbytes} with its {of}: {remedy}"
            )


def _octets(data: BytesLike) -> memoryview:
    """Return the bytes, read-only and not copied. Raises `TypeError` for anything but contiguous bytes."""
    view = memoryview(data)
    return (view if view.format == "B" and view.ndim == 1 and view.contiguous else view.cast("B")).toreadonly()


def _header_nbytes(entries: int, sections: int) -> int:
    return _FIXED.size + entries * _ABSENT.size + sections * _INDEX.size + _CRC.size


def _header_cap(nbytes: int) -> str:
    return f"a header of {nbytes} bytes, expected at most {MAX_HEADER_NBYTES} (longer blocks make it smaller)"


def _fields_fault(h: ContainerHeader) -> str | None:
    for name, least, most in _RANGES:
        value = getattr(h, name)
        if not (isinstance(value, int) and least <= value <= most):
            return f"{name} is {value!r}, expected an integer from {least} to {most}"
    if not isinstance(h.codec_sha256, bytes) or len(h.codec_sha256) != 32:
        return f"codec_sha256 is {h.codec_sha256!r}, expected 32 bytes"
    if h.kept_bits not in (8, 16):
        return f"kept_bits is {h.kept_bits!r}, expected 8 or 16"
    if h.start + h.tokens > MAX_POSITION:
        return f"{h.tokens} tokens from position {h.start}, expected none beyond {MAX_POSITION}"
    if h.sinks + h.window > h.tokens:
        return f"{h.sinks} sinks and a window of {h.window}, expected at most the {h.tokens} tokens"
    nbytes = _header_nbytes(len(h.absent), h.section_count)
    return _header_cap(nbytes) if nbytes > MAX_HEADER_NBYTES else None


def _absent_fault(h: ContainerHeader) -> str | None:
    if len(h.absent) > MAX_U16:
        return f"absent has {len(h.absent)} entries, expected at most {MAX_U16}"
    before = -1
    for layer_idx, tokens in h.absent:
        if not (isinstance(layer_idx, int) and before < layer_idx <= MAX_U16):
            return f"absent names layer {layer_idx!r} after {before}, expected ascending integers up to {MAX_U16}"
        if not (isinstance(tokens, int) and 1 <= tokens <= h.tokens):
            return f"layer {layer_idx} lacks {tokens!r} tokens, expected an integer from 1 to {h.tokens}, or no entry"
        before = layer_idx
    return None
