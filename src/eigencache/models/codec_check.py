"""Check that a saved codec was fitted on the loaded model: a basis of another model would damage its cache silently."""

from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.folder import AnyCodec, SavedCodec
from eigencache.errors import CodecError
from eigencache.models.embeddings import embed_of
from eigencache.models.identity import fingerprint_before
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import rope_sha256


def codec_for(saved: SavedCodec, loaded: LoadedModel) -> AnyCodec:
    """Return a saved codec on the device of the model, connected to its embeddings.

    Args:
        saved: Codec and card from a folder.
        loaded: The model that uses it.

    Raises:
        CodecError: The codec was fitted on another model (`check_belongs`).
    """
    check_belongs(saved, loaded)
    codec = saved.codec.of_model(embed_of(loaded.model)) if isinstance(saved.codec, EigenCodec) else saved.codec
    return codec.to(loaded.device)


def check_belongs(saved: SavedCodec, loaded: LoadedModel) -> None:
    """Check that a codec was fitted on a model with the same dtype, RoPE and weights; no option overrides this.

    Dtype and RoPE are compared first, although they also change the hash of the model, because their errors are more
    specific. Cost: one forward pass over 64 tokens (512 in 16 bits).

    Args:
        saved: Codec and card from a folder.
        loaded: The model that uses it.

    Raises:
        CodecError: One of them differs; the message names both models and what to do.
    """
    origin, refit = saved.card.origin, "or fit a codec on this model (`eigencache fit`)"
    dtype = loaded.dtype_name
    if dtype != origin.dtype:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model} in {origin.dtype}, {loaded.name} is loaded in {dtype}: "
            f"use `dtype` {origin.dtype}, {refit}"
        )
    rope = rope_sha256(rotations_of(loaded))
    if rope != origin.rope_sha256:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model}; this is {loaded.name}, which rotates keys differently (RoPE "
            f"{rope[:12]} instead of {origin.rope_sha256[:12]}): load {origin.model} as it was for the fit, {refit}"
        )
    sha256 = loaded.sha256
    if sha256 != origin.model_sha256 and fingerprint_before(loaded.model) != origin.model_sha256:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model} ({origin.model_sha256[:12]}), this is {loaded.name} ({sha256[:12]}), "
            f"other weights or another configuration: load the model it was fitted on, {refit}"
        )
