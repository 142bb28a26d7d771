"""Greedy generation through the cache parts from the uncompressed one after some tokens, or never (THEORY 10).

Every generated token reads its past through the cache, the first one too: all of a prompt but its last token is in the
cache before generation begins. Generation goes on past the end of a text, so that all answers have one length.
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


@torch.no_grad()
def measure_divergence(
    session: Session,
    sequences: Sequences,
    codecs: Mapping[str, Compressor],
    *,
    prompts: int = 16,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    window: Window = WHOLE,
) -> list[Divergence]:
    """One result per codec, against the uncompressed cache on the same prompts; `on_progress`: prompts so far, of all.

    Raises `CorpusError` where the text has too few prompts, `ModelError` where the model has too few positions.
    """
    if min(prompts, new_tokens, session.batch_size) < 1:
        raise CorpusError(
            f"{prompts} prompts of {new_tokens} new tokens, {session.batch_size} at a time: at least 1 of each is needed"
        )
    check_positions(session.loaded, prompt_tokens + new_tokens)
    ids = cut_prompts(sequences, prompts, prompt_tokens)
    reference: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in codecs}
    for start in range(0, prompts, session.batch_size):
        batch = torch.from_numpy(ids[start : start + session.batch_size]).to(session.loaded.device)
        prefix = read_prefix(session.loaded, batch[:, :-1])
        reference.append(generate_greedily(prefix, batch, None, new_tokens))
        for name, codec in codecs.items():
            answers[name].append(generate_greedily(prefix, batch, codec, new_tokens, window))
        session.on_progress("generation", min(start + session.batch_size, prompts), prompts)
    return [divergence(name, torch.cat(reference), torch.cat(found), prompt_tokens) for name, found in answers.items()]


def cut_prompts(sequences: Sequences, prompts: int, prompt_tokens: int) -> np.ndarray:
    """Prompts [prompts, prompt_tokens] that do not overlap, spread evenly over the text.

    Raises `CorpusError` where the text has fewer.
    """
    if prompt_tokens < 2:
        raise CorpusError(f"prompts of {prompt_tokens} tokens: at least 2 are needed, the last of which reads the cache")
    places = [(row, at) for row in sequences.ids for at in range(0, len(row) - prompt_tokens + 1, prompt_tokens)]
    if len(places) < prompts:
        raise CorpusError(
            f"{sequences.corpus.name}: {len(places)} prompts of {prompt_tokens:,} tokens can be cut, {prompts} are wanted: "
            "give more text, or ask for fewer or shorter prompts"
        )
    chosen = [places[i * len(places) // prompts] for i in range(prompts)]
    return np.stack([row[at : at + prompt_tokens] for row, at in chosen])


def generate_greedily(
    prefix: Prefix, ids: Tensor, codec: Compressor | None, new_tokens: int, window: Window = WHOLE
) -> Tensor:
    """The `new_tokens` tokens [batch, new_tokens] that are ranked first one after the other.

    `prefix` has read all of `ids` [batch, seq] but the last token. Penalties and the end token of the model's own
    generation settings are put aside: they would hide what the cache does. Raises `NonFiniteError`.
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
    """Where two sets of answers [prompts, new_tokens] part, and at how many positions they agree."""
    equal = (reference == answers).cpu()
    return Divergence(
        codec=codec,
        prompt_tokens=prompt_tokens,
        new_tokens=equal.shape[1],
        tokens_until_parting=equal.long().cumprod(1).sum(1).tolist(),
        agreement=equal.double().mean(1).tolist(),
    )
