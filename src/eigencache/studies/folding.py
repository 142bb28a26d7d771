"""Compare attention on coefficients with attention after decoding, on real text.

Both compress every token, the newest one included, so that only the order of the matrix products differs.
"""

import torch

from eigencache.codec.pca import PCACodec
from eigencache.corpora.sequences import Sequences
from eigencache.models.folding import coefficient_cache, folded
from eigencache.models.load import LoadedModel
from eigencache.records.folding import FoldingResult


@torch.no_grad()
def measure_folding(loaded: LoadedModel, sequences: Sequences, codec: PCACodec) -> FoldingResult:
    """Compare the logits of whole sequences in attention on coefficients, decode-then-attend, and without compression.

    Args:
        loaded: The model.
        sequences: Text to read.
        codec: Codec whose bases are folded into the attention.

    Raises:
        CodecError: The codec cannot be folded into this model; other errors of `folded` and `coefficient_cache`.
    """
    model = loaded.model
    rounding = effect = scale = 0.0
    nbytes = plain_nbytes = 0
    for ids in sequences.ids:
        row = torch.from_numpy(ids)[None].to(loaded.device)
        plain = model(input_ids=row, use_cache=True)
        decoded = model(input_ids=row, past_key_values=coefficient_cache(model, codec, decoded=True)).logits
        with folded(model, loaded.geometry, codec) as cache:
            logits = model(input_ids=row, past_key_values=cache).logits
        rounding = max(rounding, float((logits - decoded).abs().max()))
        effect = max(effect, float((decoded - plain.logits).abs().max()))
        scale = max(scale, float(plain.logits.abs().max()))
        nbytes, plain_nbytes = _nbytes(cache), _nbytes(plain.past_key_values)
    return FoldingResult(
        codec.name,
        sequences.corpus.tokens,
        rounding,
        effect,
        scale,
        nbytes,
        plain_nbytes,
        loaded.dtype_name,
    )


def _nbytes(cache: object) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))  # type: ignore[attr-defined]
