"""What a prediction knows of a token: features of the model's own embedding of it, which no codec needs to hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.row_major import RowMajor
from eigencache.errors import CodecError

Embed = Callable[[Tensor], Tensor]  # token ids [n] → embeddings [n, d] float32 on the CPU or where the model is


@dataclass(frozen=True, eq=False)
class EmbeddingFeatures(RowMajor):
    """Of tokens by rank: an embedding, brought to unit mean square, @ `projection` [d, h] float16, less `shift` [h] float32.

    `order` int32 [vocabulary]: the token of every rank. `embed` asks the model; None: not known yet (`of_model`).
    """

    order: Tensor
    projection: Tensor
    shift: Tensor
    embed: Embed | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.order)

    @property
    def size(self) -> int:
        """How many features a token has."""
        return len(self.shift)

    def of(self, ranks: Tensor) -> Tensor:
        """Features [n, h] float32 of ranks [n]. Raises `CodecError` before the model is known."""
        if self.embed is None:
            raise CodecError(
                "this codec predicts from its model's embeddings: load it with CacheCodec.load(folder, model, tokenizer)"
            )
        found = unit_mean_square(self.embed(self.order[ranks].long()).to(self.shift))
        return found @ self.projection.float() - self.shift

    def of_model(self, embed: Embed) -> "EmbeddingFeatures":
        """The same for a model. Raises `CodecError` for embeddings of another size."""
        if (size := embed(self.order[:1].long()).shape[-1]) != len(self.projection):
            raise CodecError(f"the model's embeddings have {size} numbers, this codec was fitted on {len(self.projection)}")
        return replace(self, embed=embed)


@dataclass(frozen=True, eq=False)
class StoredFeatures(RowMajor):
    """Of tokens by rank, as codecs of earlier versions hold them: `table` [vocabulary, h] float16."""

    table: Tensor

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.table)

    @property
    def size(self) -> int:
        """How many features a token has."""
        return self.table.shape[1]

    def of(self, ranks: Tensor) -> Tensor:
        """Features [n, h] float32 of ranks [n]."""
        return self.table[ranks].float()

    def of_model(self, embed: Embed) -> "StoredFeatures":
        """The same: nothing is asked of the model."""
        return self


def unit_mean_square(embeddings: Tensor) -> Tensor:
    """Embeddings [n, d] of mean square 1, which is what the first layer's norm makes of them."""
    return F.normalize(embeddings, dim=-1) * embeddings.shape[-1] ** 0.5
