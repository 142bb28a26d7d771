"""Collect Python sources, drop files that resemble a held-out module, train the tokenizer and write token ids.

    python training/prepare.py --out build/training [--download]

Sources are the calibration modules of the standard library and the packages of `packages.txt` (wheels in OUT/wheels, fetched
by `--download`). Files are deduplicated by content. A file that shares more than a tenth of its long lines with a held-out
module, such as a vendored copy or a backport, is dropped.
Writes OUT/tokenizer.json, OUT/train.bin (uint16 token ids) and OUT/sources.json (counts and hashes).
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from eigencache.corpora.stdlib import module_paths

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
MAX_FILE_CHARS = 300_000
MIN_FILE_CHARS = 200
MAX_PACKAGE_CHARS = 4_000_000  # limits the share of one package
LONG_LINE = 40
MAX_SHARED_LINES = 0.1


def download(wheels: Path) -> None:
    """Download the packages of packages.txt as wheels; a package without a wheel is reported and skipped."""
    names = (Path(__file__).parent / "packages.txt").read_text().split("\n")
    for name in tqdm([n for n in names if n and not n.startswith("#")], desc="wheels"):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(wheels),
            name,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            print(f"{name}: no wheel, skipped")


def long_lines(text: str) -> set[str]:
    """Return the distinct stripped lines that are long enough to identify the origin of a file."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE}


def wheel_sources(wheel: Path, rng: random.Random) -> list[str]:
    """Return the Python sources of a wheel without tests, shuffled and limited in size."""
    texts, total = [], 0
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in sorted(archive.namelist()) if n.endswith(".py") and "/tests/" not in n and "/test/" not in n]
        rng.shuffle(names)
        for name in names:
            text = archive.read(name).decode("utf8", errors="ignore")
            if MIN_FILE_CHARS < len(text) < MAX_FILE_CHARS and total + len(text) < MAX_PACKAGE_CHARS:
                texts.append(text)
                total += len(text)
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with VOCAB_SIZE entries; id 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--download", action="store_true", help="download the wheels of packages.txt first")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of files; default: 0")
    args = parser.parse_args()
    wheels = args.out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if args.download:
        download(wheels)

    rng = random.Random(args.seed)
    read = lambda path: path.read_text(encoding="utf8", errors="ignore")
    held_out = set().union(*(long_lines(read(path)) for _, path in module_paths("held-out")))
    stdlib = [text for _, path in module_paths("calibration") if len(text := read(path)) > MIN_FILE_CHARS]
    packages = [text for wheel in tqdm(sorted(wheels.glob("*.whl")), desc="sources") for text in wheel_sources(wheel, rng)]

    seen: set[bytes] = set()
    kept, dropped = [], {"duplicate": 0, "resembles a held-out module": 0}
    for text in stdlib + packages:
        digest, lines = hashlib.sha256(text.encode()).digest(), long_lines(text)
        if digest in seen:
            dropped["duplicate"] += 1
        elif len(lines & held_out) > MAX_SHARED_LINES * max(1, len(lines)):
            dropped["resembles a held-out module"] += 1
        else:
            seen.add(digest)
            kept.append(text)
    rng.shuffle(kept)

    tokenizer = train_tokenizer(kept[:4000])
    tokenizer.save(str(args.out / "tokenizer.json"))
    total = 0
    with open(args.out / "train.bin", "wb") as file:
        for start in tqdm(range(0, len(kept), 256), desc="tokens"):
            for encoding in tokenizer.encode_batch(kept[start : start + 256]):
                ids = np.array([0, *encoding.ids], dtype=np.uint16)
                file.write(ids.tobytes())
                total += len(ids)
    summary = {
        "files": len(kept),
        "dropped": dropped,
        "tokens": total,
        "characters": sum(map(len, kept)),
        "sha256": hashlib.sha256((args.out / "train.bin").read_bytes()).hexdigest(),
        "wheels": sorted(wheel.name for wheel in wheels.glob("*.whl")),
    }
    (args.out / "sources.json").write_text(json.dumps(summary, indent=1))
    print({key: value for key, value in summary.items() if key != "wheels"})


if __name__ == "__main__":
    main()
