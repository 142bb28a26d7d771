"""The hand-over of a layer from `CompressedLayer.update` to the attention function that transformers calls next.

In a transformers decoder layer, `cache.update(...)` and the attention function are two separate calls, and the attention
function does not receive the cache. `update` therefore stores its layer here, and the attention function takes it. A layer
whose attention never takes it was updated in a model whose attention this package does not serve; `require_taken` finds this
out at the next update.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import Tensor, nn

from eigencache.errors import CodecError

if TYPE_CHECKING:
    from eigencache.models.live_cache.layer import CompressedLayer


class PendingAttention:
    """The layer that was updated last and whose attention comes next; one per thread and asynchronous task."""

    def __init__(self) -> None:
        self._layer: ContextVar[CompressedLayer | None] = ContextVar("pending_attention", default=None)

    def put(self, layer: "CompressedLayer") -> None:
        """Store the layer that was just updated."""
        self._layer.set(layer)

    def take(self, module: nn.Module, keys: Tensor) -> "CompressedLayer | None":
        """Remove the stored layer, and return it if it belongs to this attention call.

        Args:
            module: The model's attention module.
            keys: Keys that the module attends to [batch, KV heads, tokens, dim].

        Returns:
            The layer; None if none is stored, or another layer, or one with another number of tokens in its window.
        """
        layer = self._layer.get()
        self.clear()
        if layer is None or layer.layer_idx != getattr(module, "layer_idx", None) or keys.shape[2] != layer.window_count:
            return None
        return layer

    def clear(self) -> None:
        """Forget the stored layer: its attention is done without this package."""
        self._layer.set(None)

    def require_taken(self, layer: "CompressedLayer") -> None:
        """Check that attention has read the tokens that entered before.

        Args:
            layer: A layer that is about to be updated.

        Raises:
            CodecError: The attention of this layer, or of the last updated layer of the same cache, was not called. The
                tokens that it has not read are removed.
        """
        last = self._layer.get()
        for unread in (layer, last if last is not None and last.owner is layer.owner else None):
            if unread is not None and unread.entered:
                self.clear()
                unread.crop(-unread.entered)
                raise CodecError(
                    f"layer {unread.layer_idx}: attention did not read the compressed cache, because the model's attention "
                    "was replaced: do not change the attention implementation while a compressed cache is in use"
                )


pending = PendingAttention()
