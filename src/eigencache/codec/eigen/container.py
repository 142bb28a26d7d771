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

from eigencache.codec.eigen.container_header import (
    ABSENT,
    CRC,
    FIXED,
    INDEX,
    MAX_HEADER_NBYTES,
    MAX_U32,
    ContainerHeader,
    header_cap,
    header_nbytes,
)
from eigencache.errors import (
    ContainerChecksumError,
    ContainerHeaderError,
    ContainerVersionError,
    NotAContainerError,
    OverlongContainerError,
    TruncatedContainerError,
)

BytesLike = bytes | bytearray | memoryview

MAGIC, VERSION = b"\x89EKV", 1
_START = struct.Struct("<4sH")  # magic, version


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
            FIXED.pack(MAGIC, VERSION, *fields),
            *(ABSENT.pack(*entry) for entry in c.absent),
            *(INDEX.pack(len(section), zlib.crc32(section)) for section in sections),
        )
    )
    return b"".join((header, CRC.pack(zlib.crc32(header)), *sections))


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
        self._index = FIXED.size + ABSENT.size * len(self.header.absent)
        lengths = (length for length, _ in INDEX.iter_unpack(self._data[self._index : self.header.header_nbytes - CRC.size]))
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
        _, expected = INDEX.unpack_from(self._data, self._index + i * INDEX.size)
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
        self._need(FIXED.size, "fixed fields", "fetch or write it again")
        _, _, kept_bits, sinks, window, start, tokens, block, entries, sha256 = FIXED.unpack_from(data)
        try:
            header = ContainerHeader(sha256, start, tokens, sinks, window, kept_bits, block, absent=())
            nbytes = header_nbytes(entries, header.section_count)
            if nbytes > MAX_HEADER_NBYTES:
                raise ContainerHeaderError(header_cap(nbytes))
            self._need(nbytes, "header", f"fetch or write it again (or its first {FIXED.size} bytes are damaged)")
            (expected,) = CRC.unpack_from(data, nbytes - CRC.size)
            if (found := zlib.crc32(data[: nbytes - CRC.size])) != expected:
                raise ContainerHeaderError(f"header has checksum {found:08x}, expected {expected:08x}")
            table = data[FIXED.size : FIXED.size + entries * ABSENT.size]
            return replace(header, absent=tuple(ABSENT.iter_unpack(table)))
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
