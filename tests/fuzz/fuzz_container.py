"""Mutated containers are read as they were written or refused with a `CodecError`: never other content, never a crash.

    python tests/fuzz/fuzz_container.py --mutations 100000 --seed 0
    python tests/fuzz/fuzz_container.py --atheris -max_total_time=300

The first needs nothing but the package. The second is guided by coverage and needs atheris; arguments behind `--atheris`
are libFuzzer's. Both stop at the first failure and print the bytes that caused it.
"""

from __future__ import annotations

import argparse
import importlib
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from eigencache.codec.eigen import container as codec
from eigencache.errors import CodecError, ContainerChecksumError

RIGHT = "right answer"
GOLDEN = Path(__file__).parents[1] / "codec" / "eigen" / "golden"
FIXED = 68
FIELDS = ((4, 2), (6, 2), (8, 4), (12, 4), (16, 8), (24, 8), (32, 2), (34, 2), (36, 8))  # offset, bytes
Pair = tuple[codec.Container, codec.Container]


def random_container(rng: Random) -> codec.Container:
    sinks, window, block = rng.choice((0, 0, 1, 4)), rng.choice((0, 0, 1, 8)), rng.choice((1, 3, 16, 65535))
    tokens = sinks + window + rng.choice((0, 1, block, 2 * block + 1, rng.randrange(5 * block)))
    layers = sorted(rng.sample(range(40), rng.choice((0, 0, 1, 3)) if tokens else 0))
    header = codec.ContainerHeader(
        codec_sha256=rng.randbytes(32),
        start=rng.choice((0, rng.randrange(2**13), 2**40 - tokens)),
        tokens=tokens,
        sinks=sinks,
        window=window,
        kept_bits=rng.choice((8, 16)),
        block=block,
        absent=tuple((layer_idx, rng.randint(1, tokens)) for layer_idx in layers),
    )
    sections = tuple(rng.randbytes(rng.choice((0, 1, 9, 33))) for _ in range(header.section_count))
    return codec.Container(**vars(header), sections=sections)


def header_end(data: bytes) -> int | None:
    """Where the fields at hand say that the header ends, computed apart from the code under test."""
    if len(data) < FIXED:
        return None
    _, _, _, sinks, window, _, tokens, block, entries, _ = struct.unpack_from("<4sHHIIQQHH32s", data)
    coded = tokens - sinks - window
    if block == 0 or coded < 0:
        return None
    end = FIXED + 10 * entries + 8 * ((coded + block - 1) // block + (sinks > 0) + (window > 0)) + 4
    return end if end <= len(data) else None


def sealed(data: bytes) -> bytes:
    """The header's checksum made right again, so that the checks behind it are reached."""
    if (end := header_end(data)) is None:
        return data
    return data[: end - 4] + struct.pack("<I", zlib.crc32(data[: end - 4])) + data[end:]


def flip_bits(rng: Random, data: bytes, _: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(rng: Random, data: bytes, _: bytes) -> bytes:
    a = rng.randrange(len(data))
    piece = rng.choice((rng.randbytes(rng.randint(1, 9)), bytes(rng.randint(1, 40)), b"\xff" * rng.randint(1, 9)))
    return data[:a] + piece + data[a + len(piece) :]


def truncate(rng: Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(rng: Random, data: bytes, _: bytes) -> bytes:
    a = rng.randint(0, len(data))
    return data[:a] + rng.choice((rng.randbytes(rng.randint(1, 20)), bytes(rng.randint(1, 9)), data[a : a + 10])) + data[a:]


def delete(rng: Random, data: bytes, _: bytes) -> bytes:
    a = rng.randrange(len(data))
    return data[:a] + data[a + rng.choice((1, 2, 8, 10, 30)) :]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    ends = [0, 4, FIXED, header_end(data) or 0, len(data), rng.randint(0, len(data))]
    starts = [0, 4, FIXED, header_end(other) or 0, len(other), rng.randint(0, len(other))]
    return data[: rng.choice(ends)] + other[rng.choice(starts) :]


def copy_within(rng: Random, data: bytes, _: bytes) -> bytes:
    a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 40)
    return data[:a] + data[b : b + n] + data[a + n :]


def edit_field(rng: Random, data: bytes, _: bytes) -> bytes:
    """Fields of the header and index replaced under a checksum that is right."""
    for _ in range(rng.choice((1, 1, 2))):
        end = header_end(data) or FIXED
        table = [(at, rng.choice((2, 4, 8))) for at in range(FIXED, end - 8)]
        at, width = rng.choice(FIELDS + tuple(table)) if rng.random() < 0.5 else rng.choice(FIELDS)
        value = int.from_bytes(data[at : at + width], "little")
        near = value + rng.choice((-256, -8, -2, -1, 1, 2, 8, 256))
        edited = rng.choice((near, near, 0, 1, 2**16 - 1, 2**32 - 1, 2**40, 2**40 + 1, 2**63, -1, rng.getrandbits(64)))
        data = data[:at] + (edited % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]
    return sealed(data)


def damage_and_seal(rng: Random, data: bytes, other: bytes) -> bytes:
    """Any damage, under a checksum of the header that is right."""
    return sealed(rng.choice(HONEST)(rng, data, other))


Operator = Callable[[Random, bytes, bytes], bytes]
HONEST: tuple[Operator, ...] = (flip_bits, overwrite, truncate, insert, delete, splice, copy_within)
FORGING: tuple[Operator, ...] = (edit_field, damage_and_seal)


def outcome(data: bytes, originals: Pair | None = None) -> str:
    """`RIGHT`, or the class of the `CodecError`; everything else leaves as an exception.

    With `originals`, what is read must be one of them, section by section: the checksums are as they were written.
    Without, the header was forged and may be another one; but then those bytes, and no others, are how it is written.
    """
    try:
        reader = codec.Reader(data)
    except CodecError as error:
        return type(error).__name__
    header, refused = reader.header, ""
    same = [o for o in originals or () if all(getattr(o, name) == value for name, value in vars(header).items())]
    assert originals is None or same, "another header was read"
    for i in range(header.section_count):
        try:
            section = reader.section(i)
        except ContainerChecksumError as error:
            refused = type(error).__name__
        else:
            assert originals is None or any(section == o.sections[i] for o in same), f"another section {i} was read"
    try:
        found = codec.read(data)
    except CodecError as error:
        assert refused == type(error).__name__, "what reads section by section must read as a whole"
        return refused
    assert not refused and codec.write(found) == data, "other bytes were read than are written"
    return RIGHT


def attempt(operator: Operator, rng: Random, pair: Pair) -> str:
    """One mutation and what came of it; a failure names the bytes."""
    data = operator(rng, codec.write(pair[0]), codec.write(pair[1]))
    try:
        return outcome(data, pair if operator in HONEST else None)
    except Exception as error:
        error.add_note(f"{operator.__name__} made {data.hex()}")
        raise


def run(mutations: int, seed: int) -> Counter[str]:
    rng, counts, began = Random(seed), Counter[str](), time.monotonic()
    pair = random_container(rng), random_container(rng)
    for i in range(mutations):
        if i % 20 == 0:
            pair = random_container(rng), random_container(rng)
        counts[attempt(rng.choice(HONEST + FORGING), rng, pair)] += 1
        if (i + 1) % 5000 == 0:
            print(f"\r{i + 1:,} of {mutations:,}, {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return counts


def summary(counts: Counter[str]) -> str:
    refused = counts.total() - counts[RIGHT]
    by_class = ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items()) if name != RIGHT)
    return f"{counts.total():,} mutated containers: {counts[RIGHT]:,} right answers, {refused:,} CodecErrors ({by_class})"


def run_atheris(arguments: list[str]) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("--atheris needs atheris: pip install atheris, or run --mutations, which needs nothing")
    with atheris.instrument_imports(include=["eigencache.codec.eigen.container", "eigencache.codec.eigen.container_header"]):
        importlib.reload(codec)
    counts = Counter[str]()

    def one_input(data: bytes) -> None:
        for candidate in (data, sealed(data)):
            counts[outcome(candidate)] += 1
            if counts.total() % 1_000_000 == 0:  # libFuzzer leaves the process without returning
                print(summary(counts), file=sys.stderr, flush=True)

    seeds = ",".join(map(str, GOLDEN.glob("*.ekv")))
    atheris.Setup([sys.argv[0], "-max_len=1024", f"-seed_inputs={seeds}", *arguments], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", nargs=argparse.REMAINDER, help="guided by coverage; what follows is libFuzzer's")
    arguments = parser.parse_args()
    if arguments.atheris is not None:
        run_atheris(arguments.atheris)
    else:
        print(summary(run(arguments.mutations, arguments.seed)))


if __name__ == "__main__":
    main()
