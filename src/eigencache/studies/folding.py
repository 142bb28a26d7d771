"""Does attention on coefficients give the logits of decode-then-attend? Measured on real text, for every target.

Both ways compress every token, the newest too, so that nothing but the order of the products differs.
"""

import torch

from eigencache.codec.pca import PCACodec
from eigencache.corpora.sequences import Sequences
from eigencache.models.folding import coefficient_cache, folded
from eigencache.models.load import LoadedModel
from eigencache.records.folding import FoldingResult


@torch.no_grad()
def measure_folding(loaded: LoadedModel, sequences: Sequences, codec: PCACodec) -> FoldingResult:
    """Compare logits of whole sequences. Raises what `folded` and `coefficient_cache` raise."""
    model = loaded.model
    rounding = effect = scale = 0.0
    held = plain_held = 0
    for ids in sequences.ids:
        row = torch.from_numpy(ids)[None].to(loaded.device)
        plain = model(input_ids=row, use_cache=True)
        decoded = model(input_ids=row, past_key_values=coefficient_cache(model, codec, decoded=True)).logits
        with folded(model, loaded.geometry, codec) as cache:
            found = model(input_ids=row, past_key_values=cache).logits
        rounding = max(rounding, float((found - decoded).abs().max()))
        effect = max(effect, float((decoded - plain.logits).abs().max()))
        scale = max(scale, float(plain.logits.abs().max()))
        held, plain_held = _nbytes(cache), _nbytes(plain.past_key_values)
    return FoldingResult(
        codec.name,
        sequences.corpus.tokens,
        rounding,
        effect,
        scale,
        held,
        plain_held,
        str(model.dtype).removeprefix("torch."),
    )


def _nbytes(cache: object) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))  # type: ignore[attr-defined]
