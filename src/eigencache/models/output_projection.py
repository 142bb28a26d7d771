"""The output projection of an attention layer, found by the common names, and its rows per query head."""

from torch import Tensor, nn

from eigencache.geometry import Layer
from eigencache.models.linear_map import linear_map

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")


def output_projection(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """Return name and module of the output projection; None for a module that is not a known attention layer."""
    for name in OUTPUT_PROJECTIONS:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return name, module
    return None


def output_rows(projection: nn.Module, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Return W_O per query head and its bias.

    Args:
        projection: The output projection of the layer.
        layer: Geometry of the layer.

    Returns:
        W_O [heads, v_head_dim, hidden], by which the outputs of the heads are multiplied, and the bias [hidden] or None.

    Raises:
        UnsupportedArchitectureError: The projection is not linear.
    """
    name = f"layer {layer.layer_idx}, the output projection"
    weight, bias = linear_map(projection, layer.num_attention_heads * layer.v_head_dim, name)
    rows = weight.detach().mT.unflatten(0, (layer.num_attention_heads, layer.v_head_dim))
    return rows, None if bias is None else bias.detach()
