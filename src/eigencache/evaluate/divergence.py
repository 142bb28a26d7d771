"""Measure after how many tokens greedy generation with a compressed cache differs from the uncompressed one (THEORY 10).

All tokens of a prompt but the last are cached before generation begins, so that every generated token, the first one
included, is predicted from the compressed cache. End tokens are ignored, so that all answers have the same length.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.base import Compressor
from eigencache.corpora.sequences import Sequences
from eigencache.errors import CorpusError
from eigencache.evaluate.prefix import WHOLE, Prefix, Window, check_positions, read_prefix, require_finite
from eigencache.records.quality import Divergence

NEW_TOKENS = 64


@torch.no_grad()
def measure_divergence(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Compressor],
    *,
    prompts: int = 16,
    prompt_tokens: int = 256,
    new_tokens: int = NEW_TOKENS,
    window: Window = WHOLE,
) -> list[Divergence]:
    """Compare greedy generation with each codec to generation with the uncompressed cache, on the same prompts.

    Args:
        session: Model and settings to run it with. Progress counts prompts.
        sequences: Text from which prompts are cut.
        codecs: Codecs by name.
        prompts: Number of prompts.
        prompt_tokens: Tokens per prompt, at least 2.
        new_tokens: Tokens generated per prompt.
        window: Most recent tokens that stay uncompressed, and the encoding block size. Default: no window.

    Returns:
        One result per codec.

    Raises:
        CorpusError: An argument is below 1, or the text has too few prompts.
        ModelError: The model has too few positions.
        NonFiniteError: Logits hold NaN or infinite values.
    """
    ids = checked_prompts(session, sequences, prompts, prompt_tokens, new_tokens)
    reference: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in codecs}
    for start in range(0, prompts, session.batch_size):
        batch = torch.from_numpy(ids[start : start + session.batch_size]).to(session.loaded.device)
        prefix = read_prefix(session.loaded, batch[:, :-1])
        reference.append(generate_greedily(prefix, batch, None, new_tokens))
        for name, codec in codecs.items():
            answers[name].append(generate_greedily(prefix, batch, codec, new_tokens, window))
        session.on_progress("generation", min(start + session.batch_size, prompts), prompts)
    return [divergence(name, torch.cat(reference), torch.cat(answer), prompt_tokens) for name, answer in answers.items()]


def checked_prompts(
    session: Session, sequences: Sequences, prompts: int, prompt_tokens: int, new_tokens: int = NEW_TOKENS
) -> np.ndarray:
    """Return the ids of `cut_prompts`, after checking that the model has positions for prompts and answers.

    Nothing is generated. Arguments and errors are those of `measure_divergence`.
    """
    if min(prompts, new_tokens, session.batch_size) < 1:
        raise CorpusError(
            f"`prompts` {prompts}, `new_tokens` {new_tokens}, `batch_size` {session.batch_size}: each must be at least 1"
        )
    check_positions(session.loaded, prompt_tokens + new_tokens)
    return cut_prompts(sequences, prompts, prompt_tokens)


def cut_prompts(sequences: Sequences, prompts: int, prompt_tokens: int) -> np.ndarray:
    """Return non-overlapping prompts, spread evenly over the text.

    Args:
        sequences: Text.
        prompts: Number of prompts.
        prompt_tokens: Tokens per prompt, at least 2.

    Returns:
        Token ids [prompts, prompt_tokens].

    Raises:
        CorpusError: The text has too few prompts, or `prompt_tokens` is below 2.
    """
    if prompt_tokens < 2:
        raise CorpusError(f"`prompt_tokens` {prompt_tokens}: must be at least 2, because the last token is not cached")
    starts = [(row, start) for row in sequences.ids for start in range(0, len(row) - prompt_tokens + 1, prompt_tokens)]
    if len(starts) < prompts:
        raise CorpusError(
            f"`prompts` {prompts}: {sequences.corpus.name} has only {len(starts)} prompts of {prompt_tokens:,} tokens. "
            "Use more text (`tokens`) or lower `prompts`."
        )
    chosen = [starts[i * len(starts) // prompts] for i in range(prompts)]
    return np.stack([row[start : start + prompt_tokens] for row, start in chosen])


def generate_greedily(
    prefix: Prefix, ids: Tensor, codec: Compressor | None, new_tokens: int, window: Window = WHOLE
) -> Tensor:
    """Generate tokens greedily from a compressed prefix.

    Penalties and end tokens of the model's generation settings are ignored, because they would hide the cache's effect.

    Args:
        prefix: All of `ids` but the last token.
        ids: Prompts [batch, seq].
        codec: Codec of the prefix, or None for the uncompressed cache.
        new_tokens: Number of tokens to generate.
        window: Most recent tokens that stay uncompressed, and the encoding block size. Default: no window.

    Returns:
        Generated ids [batch, new_tokens].

    Raises:
        NonFiniteError: Logits hold NaN or infinite values.
    """

    def checked(_: Tensor, scores: Tensor) -> Tensor:
        require_finite(scores)
        return scores

    model = prefix.loaded.model
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=prefix.cache(codec, window),
        logits_processor=[checked],
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=None,
        max_new_tokens=new_tokens,
    )
    return out[:, ids.shape[1] :]


def divergence(codec: str, reference: Tensor, answers: Tensor, prompt_tokens: int) -> Divergence:
    """Return where the answers of a codec first differ from reference answers, and the share of equal positions.

    Args:
        codec: Name of the codec.
        reference: Ids generated with the uncompressed cache [prompts, new_tokens].
        answers: Ids generated with the codec [prompts, new_tokens].
        prompt_tokens: Tokens per prompt.
    """
    equal = (reference == answers).cpu()
    return Divergence(
        codec=codec,
        prompt_tokens=prompt_tokens,
        new_tokens=equal.shape[1],
        tokens_until_parting=equal.long().cumprod(1).sum(1).tolist(),
        agreement=equal.double().mean(1).tolist(),
    )
