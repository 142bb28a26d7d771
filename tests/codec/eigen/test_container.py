"""What is read back equals what was written; each kind of damage has its error; the bytes are those of docs/format.md."""

from __future__ import annotations

import ast
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache import errors
from eigencache.codec.eigen import container, container_header
from eigencache.codec.eigen.container import Container, Reader, read, write
from eigencache.codec.eigen.container_header import MAX_HEADER_NBYTES, MAX_POSITION, ContainerHeader
from eigencache.errors import (
    CodecError,
    ContainerChecksumError,
    ContainerError,
    ContainerHeaderError,
    ContainerVersionError,
    ForeignContainerError,
    NotAContainerError,
    OverlongContainerError,
    TruncatedContainerError,
)

GOLDEN = Path(__file__).parent / "golden"
GOLDENS = {  # the files are frozen: a version that reads them otherwise is another version
    "no-kept-tokens": Container(bytes(range(32)), 0, 5, 0, 0, 16, 64, (), (b"five tokens",)),
    "sinks-blocks-window": Container(
        codec_sha256=b"\xab" * 32,
        start=1000,
        tokens=100,
        sinks=4,
        window=16,
        kept_bits=8,
        block=32,
        absent=(),
        sections=(bytes(range(40)), b"block 0block 0block 0", b"", b"block 2: sixteen tokens", b"\x00\xff" * 24),
    ),
    "absent-layers": Container(
        codec_sha256=bytes.fromhex("a40d3dbcfe8eb987bfc1b486ec494e2d6a1a7f0388feb88909017c2a8b94b4f4"),
        start=2**33,
        tokens=12,
        sinks=0,
        window=2,
        kept_bits=16,
        block=4,
        absent=((0, 8), (3, 12), (517, 1)),
        sections=(b"one", b"two", b"three", b"window"),
    ),
}
KNOWN = GOLDENS["sinks-blocks-window"]


@st.composite
def headers(draw: st.DrawFn) -> ContainerHeader:
    block = draw(st.sampled_from((1, 2, 7, 64, 65535)))
    sinks, window = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    tokens = sinks + window + draw(st.integers(0, 5 * block + 1)) % (12 * block)
    absent: dict[int, int] = {}
    if tokens:
        absent = draw(st.dictionaries(st.integers(0, 65535), st.integers(1, tokens), max_size=5))
    return ContainerHeader(
        codec_sha256=draw(st.binary(min_size=32, max_size=32)),
        start=draw(st.integers(0, MAX_POSITION - tokens)),
        tokens=tokens,
        sinks=sinks,
        window=window,
        kept_bits=draw(st.sampled_from((8, 16))),
        block=block,
        absent=tuple(sorted(absent.items())),
    )


@st.composite
def containers(draw: st.DrawFn) -> Container:
    header = draw(headers())
    n = header.section_count
    return Container(**vars(header), sections=tuple(draw(st.lists(st.binary(max_size=40), min_size=n, max_size=n))))


@settings(max_examples=300, deadline=None)
@given(containers())
def test_what_is_read_back_equals_what_was_written(container: Container) -> None:
    data = write(container)
    assert read(data) == read(bytearray(data)) == read(memoryview(data)) == container
    reader = Reader(data)
    assert len(data) == reader.header.header_nbytes + sum(map(len, container.sections))
    assert reader.header.header_nbytes == 72 + 10 * len(container.absent) + 8 * len(container.sections)


@settings(max_examples=100, deadline=None)
@given(headers())
def test_sections_hold_each_token_once_and_ranges_find_them(header: ContainerHeader) -> None:
    held = [t for section in range(header.section_count) for t in header.tokens_of(section)] if header.tokens < 9999 else []
    assert held == list(range(len(held))) and len(held) in (0, header.tokens)
    for section in range(header.section_count):
        tokens = header.tokens_of(section)
        assert len(tokens) > 0
        assert (
            header.sections_of(tokens) == header.sections_of(slice(tokens[0], tokens[0] + 1)) == range(section, section + 1)
        )
        block = section - header.first_block
        coded = 0 <= block < header.block_count
        assert header.blocks_of(tokens) == (range(block, block + 1) if coded else range(0))
    assert header.sections_of(slice(None)) == range(header.section_count)
    assert header.blocks_of(slice(None)) == range(header.block_count)


def test_a_range_of_tokens_names_its_blocks_and_sections() -> None:
    assert (KNOWN.first_block, KNOWN.block_count, KNOWN.section_count) == (1, 3, 5)
    assert [KNOWN.tokens_of(i) for i in range(5)] == [range(4), range(4, 36), range(36, 68), range(68, 84), range(84, 100)]
    assert KNOWN.blocks_of(range(36)) == range(1) and KNOWN.sections_of(range(36)) == range(2)
    assert KNOWN.blocks_of(range(35, 37)) == range(2)
    assert KNOWN.blocks_of(slice(-17, None)) == range(2, 3) and KNOWN.sections_of(slice(-17, None)) == range(3, 5)
    assert KNOWN.blocks_of(slice(0, 4)) == KNOWN.blocks_of(range(84, 100)) == KNOWN.sections_of(range(7, 7)) == range(0)
    assert KNOWN.sections_of(slice(90, 900)) == range(4, 5)
    for beyond in (range(99, 101), range(-1, 3), range(100, 101)):
        with pytest.raises(IndexError, match="the container has 100"):
            KNOWN.blocks_of(beyond)
    with pytest.raises(ValueError, match="step of 2"):
        KNOWN.sections_of(slice(0, 8, 2))
    for section in (-1, 5):
        with pytest.raises(IndexError, match="the container has 5"):
            KNOWN.tokens_of(section)
        with pytest.raises(IndexError, match="the container has 5"):
            Reader(write(KNOWN)).section(section)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files_read_as_when_they_were_frozen(name: str) -> None:
    data = (GOLDEN / f"{name}.ekv").read_bytes()
    assert read(data) == GOLDENS[name]
    assert write(GOLDENS[name]) == data


def test_every_golden_file_is_checked() -> None:
    assert {path.stem for path in GOLDEN.glob("*.ekv")} == set(GOLDENS)


def test_the_bytes_are_little_endian_and_of_fixed_width() -> None:
    expected = """
        89 45 4b 56  01 00  10 00  00 00 00 00  02 00 00 00
        00 00 00 00 02 00 00 00  0c 00 00 00 00 00 00 00  04 00  03 00
        a4 0d 3d bc fe 8e b9 87 bf c1 b4 86 ec 49 4e 2d 6a 1a 7f 03 88 fe b8 89 09 01 7c 2a 8b 94 b4 f4
        00 00 08 00 00 00 00 00 00 00  03 00 0c 00 00 00 00 00 00 00  05 02 01 00 00 00 00 00 00 00
        03 00 00 00 f1 86 6c 7a  03 00 00 00 66 8a ca 11  05 00 00 00 f5 d8 c5 46  06 00 00 00 dd f9 e4 8b
        f9 c6 ac e2
        6f 6e 65  74 77 6f  74 68 72 65 65  77 69 6e 64 6f 77
    """
    assert write(GOLDENS["absent-layers"]) == bytes.fromhex(expected)


def test_every_field_names_its_byte_order_and_only_the_standard_library_is_used() -> None:
    sources = [Path(module.__file__).read_text() for module in (container, container_header)]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    formats = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "struct.Struct"]
    assert len(formats) == 5 and all(f.startswith("<") for f in formats)
    assert not any(conversion in source for source in sources for conversion in ("to_bytes", "from_bytes"))
    imports = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {"eigencache.errors", "eigencache.codec.eigen.container_header"}
    assert imports == {"array", "dataclasses", "itertools"} | own


def forged(**fields: Any) -> bytes:
    """`KNOWN` with fields of the header replaced, unchecked, under a header checksum that is right."""
    values = vars(KNOWN) | {"version": 1, "index": None, "sections": KNOWN.sections, "entries": None} | fields
    packed = struct.pack(
        "<4sHHIIQQHH32s",
        b"\x89EKV",
        values["version"],
        values["kept_bits"],
        values["sinks"],
        values["window"],
        values["start"],
        values["tokens"],
        values["block"],
        len(values["absent"]) if values["entries"] is None else values["entries"],
        values["codec_sha256"],
    )
    packed += b"".join(struct.pack("<HQ", *entry) for entry in values["absent"])
    index = values["index"] or [(len(section), zlib.crc32(section)) for section in values["sections"]]
    packed += b"".join(struct.pack("<II", *entry) for entry in index)
    return packed + struct.pack("<I", zlib.crc32(packed)) + b"".join(values["sections"])


def flipped(at: int) -> bytes:
    data = bytearray(write(KNOWN))
    data[at] ^= 0x10
    return bytes(data)


LENGTHS = [(len(section), zlib.crc32(section)) for section in KNOWN.sections]
DEFECTS: dict[str, tuple[bytes, type[ContainerError], str]] = {
    "other file": (b"\x89PNG\r\n\x1a\n" + bytes(99), NotAContainerError, "begins with 89 50 4e 47, expected 89 45 4b 56"),
    "one wrong byte": (b"\x00", NotAContainerError, "begins with 00, expected"),
    "version 0": (forged(version=0), ContainerVersionError, "version 0, expected 1"),
    "version 2": (forged(version=2), ContainerVersionError, "version 2, expected 1"),
    "empty": (b"", TruncatedContainerError, "ends after 0 bytes, expected 6"),
    "fixed fields cut": (write(KNOWN)[:67], TruncatedContainerError, "ends after 67 bytes, expected 68"),
    "index cut": (write(KNOWN)[:111], TruncatedContainerError, "ends after 111 bytes, expected 112"),
    "section cut": (write(KNOWN)[:-1], TruncatedContainerError, "ends after 243 bytes, expected 244"),
    "more entries than bytes": (forged(entries=60000), TruncatedContainerError, "expected 600112 with its header"),
    "trailing byte": (write(KNOWN) + b"\0", OverlongContainerError, "245 bytes, expected 244: 1 bytes follow"),
    "twice": (write(KNOWN) * 2, OverlongContainerError, "488 bytes, expected 244: 244 bytes follow"),
    "section shorter than it is": (
        forged(index=[(39, LENGTHS[0][1]), *LENGTHS[1:]]),
        OverlongContainerError,
        "244 bytes, expected 243",
    ),
    "section longer than all": (
        forged(index=[*LENGTHS[:4], (2**32 - 1, 0)]),
        TruncatedContainerError,
        f"expected {244 - 48 + 2**32 - 1} with its sections",
    ),
    "damaged start": (flipped(20), ContainerHeaderError, "expected 9e29a665"),
    "damaged index": (flipped(75), ContainerHeaderError, "header has checksum"),
    "damaged header checksum": (flipped(110), ContainerHeaderError, "header has checksum"),
    "kept bits": (forged(kept_bits=4), ContainerHeaderError, "kept_bits is 4, expected 8 or 16"),
    "block of none": (forged(block=0), ContainerHeaderError, "block is 0, expected an integer from 1 to 65535"),
    "sinks overlap window": (
        forged(sinks=85),
        ContainerHeaderError,
        "85 sinks and a window of 16, expected at most the 100 tokens",
    ),
    "too many tokens": (forged(tokens=2**40 + 1), ContainerHeaderError, "tokens is 1099511627777, expected"),
    "most tokens": (forged(tokens=2**64 - 1), ContainerHeaderError, "tokens is 18446744073709551615, expected"),
    "late start": (forged(start=2**40), ContainerHeaderError, "100 tokens from position 1099511627776, expected none"),
    "header over its cap": (forged(tokens=2**40 - 1000), ContainerHeaderError, "expected at most 67108864"),
    "header over its cap by its table": (
        forged(tokens=20 + 32 * 8388590, entries=60000),
        ContainerHeaderError,
        f"a header of {72 + 10 * 60000 + 8 * 8388592} bytes, expected at most 67108864",
    ),
    "layers descend": (
        forged(absent=((3, 5), (2, 5))),
        ContainerHeaderError,
        "absent names layer 2 after 3, expected ascending",
    ),
    "layer twice": (
        forged(absent=((3, 5), (3, 6))),
        ContainerHeaderError,
        "absent names layer 3 after 3, expected ascending",
    ),
    "layer lacks none": (forged(absent=((3, 0),)), ContainerHeaderError, "layer 3 lacks 0 tokens, expected"),
    "layer lacks more than all": (forged(absent=((3, 101),)), ContainerHeaderError, "layer 3 lacks 101 tokens, expected"),
    "sinks section damaged": (flipped(113), ContainerChecksumError, "section 0 has checksum 3e10812a, expected 0da62e3c"),
    "window section damaged": (flipped(243), ContainerChecksumError, "section 4 has checksum"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_has_its_error_in_one_line(defect: str) -> None:
    data, error, message = DEFECTS[defect]
    with pytest.raises(error) as caught:
        read(data, "a.ekv")
    text = str(caught.value)
    assert type(caught.value) is error and message in text and text.startswith("a.ekv: ") and "\n" not in text
    assert text.count(": ") >= 2 and len(text) < 200  # what it is, what was found, what to do


def test_every_container_error_is_raised_by_some_defect() -> None:
    named = {
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ContainerError) and e is not ContainerError
    }
    assert named == {error for _, error, _ in DEFECTS.values()} | {ForeignContainerError}
    assert issubclass(ContainerError, CodecError)
    specification = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    assert all(f"`{error.__name__}`" in specification for error in named)


def test_every_proper_prefix_is_called_truncated() -> None:
    data = write(KNOWN)
    for nbytes in range(len(data)):
        with pytest.raises(TruncatedContainerError, match=f"ends after {nbytes} bytes"):
            Reader(data[:nbytes])


def test_every_single_bit_matters() -> None:
    data = write(KNOWN)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ContainerError):
            read(damaged)


def test_a_codec_reads_only_what_it_wrote() -> None:
    header = Reader(write(KNOWN)).header
    header.check_codec(b"\xab" * 32)
    with pytest.raises(ForeignContainerError, match="written by codec abababababab, expected cdcdcdcdcdcd"):
        header.check_codec(b"\xcd" * 32)


@pytest.mark.parametrize("damaged", range(5))
def test_a_damaged_section_leaves_the_others_readable(damaged: int) -> None:
    sections = list(KNOWN.sections)
    sections[damaged] = bytes(b ^ 1 for b in sections[damaged])
    reader = Reader(forged(index=LENGTHS, sections=sections))
    for i, section in enumerate(KNOWN.sections):
        if i == damaged and section:
            with pytest.raises(ContainerChecksumError, match=f"section {i} "):
                reader.section(i)
        else:
            assert reader.section(i) == section


def test_sections_are_views_that_nobody_can_write_to() -> None:
    data = bytearray(write(KNOWN))
    view = Reader(data).section(1)
    assert isinstance(view, memoryview) and view.obj is data and view.readonly


@pytest.mark.parametrize("data", ["text", None, 5, [1, 2], memoryview(bytes(200))[::2]])
def test_only_bytes_are_read(data: Any) -> None:
    with pytest.raises(TypeError):
        read(data)


def test_wide_views_are_read_as_their_bytes() -> None:
    data = (GOLDEN / "sinks-blocks-window.ekv").read_bytes()  # 244 bytes: a multiple of four
    assert read(memoryview(data).cast("I")) == KNOWN
    assert write(replace(KNOWN, sections=(memoryview(bytes(range(40))).cast("I"), *KNOWN.sections[1:]))) == data


@pytest.mark.parametrize(
    "fields",
    [
        {"codec_sha256": bytes(31)},
        {"codec_sha256": "a" * 32},
        {"start": -1},
        {"start": MAX_POSITION - 99},
        {"tokens": 100.0},
        {"tokens": -1},
        {"sinks": 2**32},
        {"window": 97},
        {"kept_bits": 32},
        {"block": 0},
        {"block": 65536},
        {"absent": ((1, 0),)},
        {"absent": ((1, 2.0),)},
        {"absent": ((65536, 1),)},
        {"absent": ((2, 1), (1, 1))},
        {"absent": tuple((layer_idx, 1) for layer_idx in range(65536))},
        {"sections": KNOWN.sections[:4]},
        {"sections": ()},
        {"block": 26},
    ],
)
def test_a_container_that_could_not_be_read_back_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ContainerHeaderError, match="expected"):
        replace(KNOWN, **fields)


def test_a_section_longer_than_its_length_field_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_U32", 39)
    with pytest.raises(ContainerHeaderError, match="section 0 is 40 bytes, expected at most 39"):
        replace(KNOWN)


def test_text_is_no_section() -> None:
    with pytest.raises(TypeError):
        replace(KNOWN, sections=("one", *KNOWN.sections[1:]))


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": MAX_POSITION - 1000, "block": 1},
        {"tokens": 8 * 10**6, "block": 1},
        {"tokens": 2**64 - 1, "block": 1},
        {"entries": 65535},
        {"index": [(2**32 - 1, 0)] * 5},
    ],
)
def test_a_header_that_claims_much_is_refused_in_less_than_a_megabyte(fields: dict[str, Any]) -> None:
    data = forged(**fields)
    tracemalloc.start()
    try:
        with pytest.raises((TruncatedContainerError, ContainerHeaderError)):
            Reader(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_the_longest_header_is_read_and_a_longer_one_cannot_be_made() -> None:
    most = (MAX_HEADER_NBYTES - 72) // 8
    fields: dict[str, Any] = vars(KNOWN) | {"sinks": 0, "window": 0, "block": 1, "start": 0}
    fields.pop("sections")
    assert ContainerHeader(**fields | {"tokens": most}).header_nbytes <= MAX_HEADER_NBYTES
    with pytest.raises(ContainerHeaderError, match="expected at most 67108864"):
        ContainerHeader(**fields | {"tokens": most + 1})


def test_a_sequence_of_no_tokens_is_a_header() -> None:
    empty = Container(bytes(32), 7, 0, 0, 0, 16, 64, (), ())
    assert len(write(empty)) == 72 and read(write(empty)) == empty


def test_the_overhead_is_below_one_percent_of_ten_kilobytes() -> None:
    three = Container(bytes(32), 0, 128, 4, 32, 16, 128, (), (bytes(1000), bytes(8000), bytes(1000)))
    assert len(write(three)) - 10_000 == 96
