"""Train one bundled model for a fixed number of steps; a stopped run resumes from its checkpoint to the same weights.

    python training/train.py ref-llama --data build/training --tokens 12e6
    python training/train.py ref-llama --data build/training --tokens 12e6 --start build/models/ref-llama --seed 1

Muon for the matrices, AdamW for other weights, bf16 autocast, a constant learning rate followed by a linear decay. Sequences
have 256, 1,024 and finally 2,048 tokens. One sequence in five has in-context copying (a real span twice, or repeated random
tokens), so that the model learns induction. A batch depends on (seed, step) alone. Writes OUT/NAME in the format of
transformers, bf16, and OUT/NAME/training.json. `--start` trains a finished model further with a new schedule, which needs a
new seed; both runs are recorded.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from architectures import MAX_LENGTH, config_of

LENGTHS = ((0.70, 256), (0.85, 1024), (1.0, MAX_LENGTH))  # (end as a share of the run, sequence length)
DECAY_FROM = 0.4  # share of the run after which the learning rate decays linearly to zero
WARMUP_STEPS = 50
MUON_LR, ADAMW_LR = 0.02, 3e-3
CHECKPOINT_EVERY = 500


def length_at(progress: float) -> int:
    """Return the sequence length at a share of the run."""
    return next(length for until, length in LENGTHS if progress < until)


def rate_at(step: int, steps: int) -> float:
    """Return the factor of the learning rate: warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - step / steps) / (1 - DECAY_FROM))


def batch_at(data: np.ndarray, step: int, steps: int, tokens_per_step: int, vocab_size: int, seed: int) -> Tensor:
    """Return the token ids of one step, with in-context copying in one sequence of five.

    Args:
        data: Training text as token ids [tokens].
        step: Index of the step.
        steps: Number of steps of the run.
        tokens_per_step: Tokens of a batch.
        vocab_size: Number of token ids.
        seed: Seed of the run.

    Returns:
        [sequences, length + 1].
    """
    rng = np.random.default_rng([seed, step])
    length = length_at(step / steps)
    rows = []
    for start in rng.integers(0, len(data) - length - 1, tokens_per_step // length):
        row = data[start : start + length + 1].astype(np.int64)
        kind = rng.random()
        span = int(rng.integers(8, (min(length, 512) + 1) // 2))
        if kind < 0.1:  # a real span twice, at a random position
            first = int(rng.integers(0, length + 1 - 2 * span)) if length + 1 > 2 * span else 0
            row[first + span : first + 2 * span] = row[first : first + span]
        elif kind < 0.2:  # repeated random tokens
            row = np.resize(rng.integers(1, vocab_size, span), length + 1)
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


def positions_of(ids: Tensor, step: int, seed: int) -> Tensor:
    """Return positions [sequences, length]; half of the sequences start at random, so that all positions are trained."""
    rng = np.random.default_rng([seed, step, 1])
    length = ids.shape[1] - 1
    start = rng.integers(0, MAX_LENGTH - length + 1, len(ids)) * (rng.random(len(ids)) < 0.5)
    return torch.arange(length) + torch.from_numpy(start)[:, None]


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for embeddings, norms and biases."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        embedding = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
        (matrices if parameter.ndim == 2 and not embedding else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="ref-gpt2, ref-llama, ref-qwen2 or ref-deepseek")
    parser.add_argument("--data", type=Path, required=True, help="output folder of prepare.py")
    parser.add_argument("--out", type=Path, default=Path("build/models"), help="output folder; default: build/models")
    parser.add_argument("--tokens", type=float, default=12e6, help="training tokens; default: 12e6")
    parser.add_argument("--tokens-per-step", type=int, default=MAX_LENGTH, help=f"tokens per batch; default: {MAX_LENGTH}")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches; default: 0")
    parser.add_argument("--start", type=Path, help="folder of a finished model to train further; needs a new --seed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default: 1 (run one process per core)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = np.memmap(args.data / "train.bin", dtype=np.uint16, mode="r")
    model = AutoModelForCausalLM.from_config(config_of(args.name), attn_implementation="sdpa").to(device)
    runs = []
    if args.start:
        runs = json.loads((args.start / "training.json").read_text())["runs"]
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32).state_dict())
    optims = optimizers(model)
    steps = int(args.tokens) // args.tokens_per_step
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / f"{args.name}.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        first = state["step"]
        print(f"{args.name}: continues at step {first} of {steps}", flush=True)

    def loss_of(ids: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = model.base_model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
            logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False)
    mean, began, done = None, time.time(), 0
    for step in range(first, steps):
        ids = batch_at(data, step, steps, args.tokens_per_step, model.config.vocab_size, args.seed)
        loss = compiled(ids.to(device), positions_of(ids, step, args.seed).to(device))
        loss.backward()
        factor = rate_at(step, steps)
        for optim, rate in zip(optims, (MUON_LR, ADAMW_LR), strict=True):
            for group in optim.param_groups:
                group["lr"] = rate * factor
            optim.step()
            optim.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        done += args.tokens_per_step
        if (step + 1) % 100 == 0:
            seen = (step + 1) * args.tokens_per_step
            speed = done / (time.time() - began)
            print(f"{args.name} step {step + 1}/{steps} tokens {seen / 1e6:.2f}M {speed:.0f}/s loss {mean:.3f}", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    folder = args.out / args.name
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(args.data / "tokenizer.json", folder)
    runs.append({"tokens": steps * args.tokens_per_step, "seed": args.seed, "train_loss": mean})
    summary = {"tokens": sum(run["tokens"] for run in runs), "runs": runs}
    (folder / "training.json").write_text(json.dumps(summary, indent=1))
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
