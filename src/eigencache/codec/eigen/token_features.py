"""Features of tokens, from which vectors are predicted: projections of the model's embeddings, which no codec stores."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.row_major import RowMajor
from eigencache.errors import CodecError

Embed = Callable[[Tensor], Tensor]  # token ids [n] → embeddings [n, d] float32 on the CPU or where the model is


@dataclass(frozen=True, eq=False)
class EmbeddingFeatures(RowMajor):
    """Features of every token, from its embedding: normalized to unit mean square, @ `projection`, − `shift`.

    Args:
        order: Token of every rank, int32 [vocabulary].
        projection: Float16 [d, h].
        shift: Float32 [h].
        embed: Returns the model's embeddings of token ids; None until `of_model` sets it.
    """

    order: Tensor
    projection: Tensor
    shift: Tensor
    embed: Embed | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return len(self.order)

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.shift)

    def of(self, ranks: Tensor) -> Tensor:
        """Return the features [n, h] in float32 of ranks [n].

        Raises:
            CodecError: `embed` is None.
        """
        if self.embed is None:
            raise CodecError(
                "this codec predicts from its model's embeddings: load it with CacheCodec.load(folder, model, tokenizer)"
            )
        embeddings = unit_mean_square(self.embed(self.order[ranks].long()).to(self.shift))
        return embeddings @ self.projection.float() - self.shift

    def of_model(self, embed: Embed) -> "EmbeddingFeatures":
        """Return the features with the embeddings of a model. Raises `CodecError` for another embedding size."""
        if (size := embed(self.order[:1].long()).shape[-1]) != len(self.projection):
            raise CodecError(f"the model's embeddings have size {size}, the codec expects {len(self.projection)}")
        return replace(self, embed=embed)


def unit_mean_square(embeddings: Tensor) -> Tensor:
    """Normalize embeddings [n, d] to mean square 1, as the norm of the first layer does."""
    return F.normalize(embeddings, dim=-1) * embeddings.shape[-1] ** 0.5
