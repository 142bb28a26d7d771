"""The output projection of an attention layer, by the names in use, as rows per query head."""

from torch import Tensor, nn

from eigencache.geometry import Layer
from eigencache.models.linear_map import linear_map

OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")


def output_projection(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """Its name and itself, or None for a module that is no attention layer of a known kind."""
    for name in OUTPUT_PROJECTIONS:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), Tensor):
            return name, module
    return None


def output_rows(projection: nn.Module, layer: Layer) -> Tensor:
    """W_O per query head [heads, v_head_dim, hidden]: what a head's output is multiplied with."""
    weight, _ = linear_map(projection, layer.num_attention_heads * layer.v_head_dim, "the output projection")
    return weight.detach().mT.unflatten(0, (layer.num_attention_heads, layer.v_head_dim))
