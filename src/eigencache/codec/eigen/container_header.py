"""The header of a container: its fields, their limits, and which section holds which token.

docs/format.md is the specification; `container.py` writes and reads the bytes.
"""

import struct
from dataclasses import dataclass

from eigencache.errors import ContainerHeaderError, ForeignContainerError

MAX_POSITION = 2**40  # of the token after the last
MAX_HEADER_NBYTES = 2**26
MAX_U16, MAX_U32 = 2**16 - 1, 2**32 - 1

# magic, version, kept_bits, sinks, window, start, tokens, block, entries of `absent`, codec_sha256
FIXED = struct.Struct("<4sHHIIQQHH32s")
ABSENT = struct.Struct("<HQ")  # layer_idx, tokens
INDEX = struct.Struct("<II")  # length and CRC-32 of a section
CRC = struct.Struct("<I")  # of all header bytes before it
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
        return header_nbytes(len(self.absent), self.section_count)

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


def header_nbytes(entries: int, sections: int) -> int:
    """Return the bytes of a header with `entries` of `absent` and `sections`."""
    return FIXED.size + entries * ABSENT.size + sections * INDEX.size + CRC.size


def header_cap(nbytes: int) -> str:
    """Return the fault of a header that is longer than the format allows."""
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
    nbytes = header_nbytes(len(h.absent), h.section_count)
    return header_cap(nbytes) if nbytes > MAX_HEADER_NBYTES else None


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
