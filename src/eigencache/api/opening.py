"""First steps of every public function: open the model and the text that it was given. The model's modes are restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences, pack
from eigencache.corpora.text import Text
from eigencache.inputs import model_of
from eigencache.memory import default_memory
from eigencache.modes import own_modes
from eigencache.progress import Progress, silent
from eigencache.studies.recommend.commands import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = str | PreTrainedModel
    Tokenizer = str | PreTrainedTokenizerBase | None
    TextLike = str | Iterable[str] | Text

TEXT = "stdlib"
HELD_OUT_TEXT = "stdlib:held-out"
TOKENS = 131_072
CALIBRATION_LENGTH = 512  # tokens of a sequence that bases are fitted on, at most


@contextmanager
def opened(
    model: Any,
    tokenizer: Any = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    memory: int | None = None,
    on_progress: Progress = silent,
) -> Iterator[Session]:
    """Yield a session with the model in eval mode; afterwards its modules are in training mode again where they were.

    Args:
        model: a name or folder, or a loaded model, which needs its `tokenizer`.
        tokenizer: a tokenizer or the name of one.
        device: device to load a named model to, or `auto` to distribute it over devices. Default: `cuda` if available,
            otherwise `cpu`.
        dtype: number format to load a named model in: `float32`, `bfloat16`, `float16`, `float64`, or `auto` for that of the
            checkpoint. Default: `float32` on a CPU, otherwise that of the checkpoint.
        batch_size: sequences per forward pass.
        seed: seed of everything random.
        memory: bytes that the work may take beside the model; None for 60 % of what is free.
        on_progress: called with the name of the work, the units done and the units in all.
    """
    with own_modes(), evaluating(model):
        loaded = model_of(model, tokenizer, device=device, dtype=dtype)
        yield Session(loaded, batch_size, seed, on_progress, default_memory() if memory is None else memory)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put every module that was in training mode back into it afterwards."""
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        for module in training:
            module.training = True


def recipe_of(session: Session, text: Any, name: str, tokens: int, max_length: int, **options: str | None) -> Recipe:
    """Return what the commands of recommended codecs share.

    Args:
        session: the model.
        text: the calibration text, as its user gave it.
        name: name of that text, for texts that have no specification.
        tokens: tokens of that text at most.
        max_length: tokens per calibration sequence.
        **options: `device` and `dtype`, as their user gave them.
    """
    given = str(text) if isinstance(text, Path) or (isinstance(text, str) and "\n" not in text) else name
    return Recipe(session.loaded.name, given, tokens, max_length, **options)


def packed(session: Session, text: Text, tokens: int | None, max_length: int) -> Sequences:
    """Return the sequences of a text in the model's tokens, reporting progress."""

    def tokenized(done: int, of: int | None) -> None:
        session.on_progress(f"tokenizing {text.name}", done, of or done)

    return pack(text, session.loaded.tokenizer, tokens=tokens, max_length=max_length, on_progress=tokenized)
