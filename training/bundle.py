"""Copy trained models into the package: weights, tokenizer and a model card with measured figures.

    python training/bundle.py --models build/models --data build/training

Reads the output of `train.py` and `prepare.py`, and writes src/eigencache/bundled/NAME. The figures of the card equal the
output of `eigencache score`.
"""

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.models.load import load
from eigencache.models.sources import BUNDLED, bundled_path
from eigencache.studies.model_quality import score_model

MAX_BYTES = 12_000_000
MIN_COPY_ACCURACY = 0.9  # below it the card calls the model under-trained
END_OF_TEXT = "<|endoftext|>"
CARD = """---
license: apache-2.0
tags: [eigencache, reference]
---
# {name}

A small {architecture} that represents its family in measurements of the KV cache: {geometry}.
It is trained, but too small to be a useful language model. {copying}

| | |
|---|---|
| parameters | {parameters:,} (bfloat16, {megabytes:.1f} MB) |
| training text | Python sources: calibration modules of the standard library and {packages} open-source packages, {files:,} files, {corpus:,} tokens after deduplication; no held-out module |
| tokens seen | {tokens:,} ({runs}; each in sequences of 256, then 1,024, then 2,048 tokens) |
| held-out loss | {loss:.3f} nats per token ({text}, {scored:,} tokens in sequences of {length:,}) |
| by position | {positions} |
| copy accuracy | {copy:.3f} (64 random tokens repeated) |

The held-out figures are printed by `eigencache score {name}`. The recipe is in `training/`.
"""  # noqa: E501


def bundle(name: str, models: Path, data: Path) -> None:
    """Copy a model into the package, score it and write its card.

    Args:
        name: Name of the model.
        models: Folder of trained models, the output of `train.py`.
        data: Folder of the training text, the output of `prepare.py`.
    """
    target, source = bundled_path(name), models / name
    target.mkdir(exist_ok=True)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(source / file, target)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    size = (target / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{name}: the weights have {size:,} bytes, the maximum is {MAX_BYTES:,}: reduce the architecture")
    loaded = load(name)
    score = score_model(loaded, pack(read_text("stdlib:held-out"), loaded.tokenizer, tokens=131_072, max_length=2048))
    training, sources = (json.loads(path.read_text()) for path in (source / "training.json", data / "sources.json"))
    ends = list(score.loss_by_position)
    copies = score.copy_accuracy >= MIN_COPY_ACCURACY
    copying = "It copies from its context." if copies else "It is under-trained: it copies from its context only in part."
    spans = ", ".join(f"{low}–{end}: {score.loss_by_position[end]:.3f}" for low, end in zip([0, *ends], ends, strict=False))
    card = CARD.format(
        name=name,
        architecture=type(loaded.model).__name__,
        geometry=loaded.geometry.describe(),
        parameters=loaded.model.num_parameters(),
        megabytes=size / 1e6,
        packages=len(sources["wheels"]),
        files=sources["files"],
        corpus=sources["tokens"],
        tokens=training["tokens"],
        runs=", then ".join(f"{run['tokens']:,} with seed {run['seed']}" for run in training["runs"]),
        loss=score.loss_nats,
        text=score.corpus.name,
        scored=score.corpus.tokens,
        length=score.corpus.max_length,
        positions=spans,
        copy=score.copy_accuracy,
        copying=copying,
    )
    (target / "README.md").write_text(card)
    print(f"{name}: loss {score.loss_nats:.3f}, copy accuracy {score.copy_accuracy:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BUNDLED), help="models to copy; default: all four")
    parser.add_argument("--models", type=Path, required=True, help="output folder of train.py")
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare.py")
    args = parser.parse_args()
    for name in args.names:
        bundle(name, args.models, args.data)


if __name__ == "__main__":
    main()
