"""Whether a saved codec belongs to a loaded model: a basis fitted on another cache would ruin this one silently."""

from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.saved.folder import AnyCodec, SavedCodec
from eigencache.errors import CodecError
from eigencache.models.embeddings import embed_of
from eigencache.models.identity import fingerprint_before
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import rope_sha256


def codec_for(saved: SavedCodec, loaded: LoadedModel) -> AnyCodec:
    """The codec of a folder where the model is, asking that one for embeddings. Raises as `check_belongs` does."""
    check_belongs(saved, loaded)
    codec = saved.codec.of_model(embed_of(loaded.model)) if isinstance(saved.codec, EigenCodec) else saved.codec
    return codec.to(loaded.device)


def check_belongs(saved: SavedCodec, loaded: LoadedModel) -> None:
    """A codec is refused for another dtype, another RoPE and other weights than it was fitted on; nothing forces it.

    Raises `CodecError` naming both models and what to do. Dtype and RoPE are looked at before the model's hash, which
    they would change too, because they say what is wrong. Costs one forward pass over 64 tokens.
    """
    origin, anew = saved.card.origin, "or fit a codec on this one (`eigencache fit`)"
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    if dtype != origin.dtype:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model} in {origin.dtype}, {loaded.name} is loaded in {dtype}: "
            f"use `dtype` {origin.dtype}, {anew}"
        )
    rope = rope_sha256(rotations_of(loaded))
    if rope != origin.rope_sha256:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model} with another RoPE ({origin.rope_sha256[:12]}) than {loaded.name} "
            f"has ({rope[:12]}): load {origin.model} with that RoPE, {anew}"
        )
    found = loaded.sha256
    if found != origin.model_sha256 and fingerprint_before(loaded.model) != origin.model_sha256:
        raise CodecError(
            f"{saved.folder}: fitted on {origin.model} ({origin.model_sha256[:12]}), this is {loaded.name} ({found[:12]}), "
            f"other weights or another configuration: load the model it was fitted on, {anew}"
        )
