"""Residual adapters in a frozen model: cached values or keys x become x + s·W_out(W_in(x)).

The adapters act on the joined heads of a layer, in forward hooks on the projections; the weights are not changed. The
columns of values or keys in the output of a projection are found by equality with the stored tensors. With an adapter the
cache stores V_eff = M·V and not V.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eigencache.errors import NonFiniteError, UnsupportedArchitectureError
from eigencache.geometry import KVGeometry, Layer
from eigencache.models.adapters import adapter_for
from eigencache.models.capture import Capture, check_layers
from eigencache.models.linear_map import linear_map

AdapterTarget = Literal["v", "k"]
WORDS: dict[AdapterTarget, str] = {"v": "values", "k": "keys"}
_INITIAL_STD = 0.02  # standard deviation of W_in before training; W_out is zero


class Residual(nn.Module):
    """The adapter x + s·W_out(W_in(x)) over the last dimension; before training W_out is zero, which leaves x unchanged.

    Args:
        width: Dimension p of a vector.
        inner_rank: Inner dimension k.
        scale: s.
        generator: Random generator of W_in.
    """

    def __init__(self, width: int, inner_rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.w_in = nn.Parameter(_INITIAL_STD * torch.randn(inner_rank, width, generator=generator))
        self.w_out = nn.Parameter(torch.zeros(width, inner_rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return M x for x [..., p], in the dtype of x; the change is computed in float32."""
        return x + (self.scale * (x.to(self.w_in.dtype) @ self.w_in.mT) @ self.w_out.mT).to(x.dtype)

    @property
    def operator(self) -> Tensor:
        """The matrix M = I + s·W_out W_in [p, p] in float64, for column vectors."""
        w_out, w_in = (weight.detach().double().cpu() for weight in (self.w_out, self.w_in))
        return torch.eye(len(w_out), dtype=torch.float64) + self.scale * w_out @ w_in


@dataclass(frozen=True, eq=False)
class Site:
    """The columns of the output of a projection that are the values or keys of a layer."""

    layer_idx: int
    module: nn.Module
    columns: Tensor  # Int64 [heads · dim], head by head
    inputs: int  # last dimension of the input of the projection

    @property
    def width(self) -> int:
        """Values per token, heads · dim."""
        return len(self.columns)


def _unchanged(x: Tensor) -> Tensor:
    return x


@contextmanager
def inserted(
    sites: Iterable[Site], residuals: Mapping[int, Residual], behind: Callable[[Tensor], Tensor] = _unchanged
) -> Iterator[dict[int, Tensor]]:
    """Apply residual adapters while the context is open; all hooks are removed on exit, also after an error.

    Args:
        sites: Sites of the adapted layers.
        residuals: Adapter by layer.
        behind: Function applied to the adapted vectors before they reach cache and attention; default: identity.

    Yields:
        Adapted vectors [batch, seq, p] of the latest forward pass by layer, before any rotation and before `behind`.
    """
    made: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            hook = _hook(site, residuals[site.layer_idx], made, behind)
            stack.callback(site.module.register_forward_hook(hook).remove)
        yield made


def _hook(
    site: Site, residual: Residual, made: dict[int, Tensor], behind: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        columns = site.columns.to(output.device)
        made[site.layer_idx] = changed = residual(output[..., columns])
        return output.index_copy(-1, columns, behind(changed))

    return hook


def find_sites(
    model: PreTrainedModel,
    geometry: KVGeometry,
    target: AdapterTarget,
    layers: Iterable[int] | None,
    input_ids: Tensor,
) -> list[Site]:
    """Return one site per layer, verified on one forward pass: its columns equal the stored tensors bit for bit.

    Args:
        model: The model.
        geometry: Its geometry.
        target: `v` for values, `k` for keys before rotation.
        layers: Layer indices; default: all layers with a cache.
        input_ids: Token ids of the forward pass [batch, seq].

    Raises:
        LayerError: A layer does not exist or has no cache.
        NonFiniteError: Stored tensors contain NaN or infinite values.
        UnsupportedArchitectureError: The model uses MLA, or normalizes or scales keys or values after the projection.
    """
    chosen = check_layers(geometry, layers)
    if latent := [layer_idx for layer_idx in chosen if geometry.layers[layer_idx].mla]:
        raise UnsupportedArchitectureError(
            f"{geometry.model_type}: layer {latent[0]} caches an MLA latent and not {WORDS[target]}, so an adapter of "
            f"{WORDS[target]} has no cache mode: use a model with MHA, GQA or MQA"
        )
    projections: dict[int, tuple[nn.Module, bool]] = {}
    outputs: dict[int, tuple[Tensor, Tensor]] = {}  # input and output of the projection
    with ExitStack() as stack:
        for module in model.modules():
            layer_idx = getattr(module, "layer_idx", None)
            if layer_idx not in chosen or layer_idx in projections or not (projection := _projection(module, target)):
                continue
            projections[layer_idx] = projection

            def after(_module: nn.Module, args: tuple, output: Tensor, layer_idx: int = layer_idx) -> None:
                outputs[layer_idx] = args[0], output

            stack.callback(projection[0].register_forward_hook(after).remove)
        captured = stack.enter_context(Capture(model, geometry, layers=chosen)).run(input_ids)
    sites = []
    for layer in captured:
        layer_idx, tensors = layer.layer_idx, layer.tensors
        stored = tensors["values"] if target == "v" else tensors.get("keys_pre_rope", tensors.get("keys"))
        site = None
        if stored is not None and layer_idx in outputs:
            if not stored.isfinite().all():
                raise NonFiniteError(
                    f"{WORDS[target]}: layer {layer_idx} contains NaN or infinite values: try `dtype` float32"
                )
            module, fused = projections[layer_idx]
            site = _proved(layer_idx, module, *outputs[layer_idx], stored, geometry.layers[layer_idx], target, fused)
        if site is None:
            raise UnsupportedArchitectureError(
                f"{geometry.model_type}: the {WORDS[target]} that layer {layer_idx} caches are not the output of a known "
                "projection (a norm or a scale follows it, or its name is unknown): an adapter cannot be inserted there"
            )
        sites.append(site)
    return sites


def _projection(attention: nn.Module, target: AdapterTarget) -> tuple[nn.Module, bool] | None:
    """Return the projection of values or keys, and whether it is fused with the projection of queries."""
    style = adapter_for(attention)
    if style is None:
        return None
    roles = style.modules(attention)
    if "fused" in roles:
        return roles["fused"], True
    separate = roles.get("keys") if target == "k" else getattr(attention, "v_proj", None)
    return (separate, False) if isinstance(separate, nn.Module) else None


def _proved(
    layer_idx: int,
    module: nn.Module,
    given: Tensor,
    output: Tensor,
    stored: Tensor,
    layer: Layer,
    target: AdapterTarget,
    fused: bool,
) -> Site | None:
    """Return the site whose columns, head by head, equal the stored tensor; None if there is none."""
    for columns in _columns(output.shape[-1], layer, target, fused):
        read = output[..., columns.to(output.device)]
        if read.shape[-1] % stored.shape[-1] == 0 and torch.equal(
            read.unflatten(-1, (-1, stored.shape[-1])).transpose(1, 2), stored
        ):
            return Site(layer_idx, module, columns, given.shape[-1])
    return None


def _columns(width: int, layer: Layer, target: AdapterTarget, fused: bool) -> Iterator[Tensor]:
    """Yield possible columns of values or keys: all of them, after the queries, or group by group."""
    every = torch.arange(width)
    if not fused:
        yield every
        return
    heads, dim = layer.num_attention_heads, layer.head_dim
    kv_heads = (width // dim - heads) // 2
    if kv_heads < 1 or (heads + 2 * kv_heads) * dim != width or heads % kv_heads:
        return
    yield every[heads * dim :].view(2, -1)[int(target == "v")]
    yield every.view(kv_heads, -1, dim)[:, -1 if target == "v" else -2].flatten()


def weight_rows(site: Site) -> tuple[Tensor, Tensor | None]:
    """Return weight [columns, inputs] and bias [columns] (or None) of the projection, for the columns of a site.

    Raises:
        UnsupportedArchitectureError: The projection is not linear.
    """
    rows, bias = linear_map(site.module, site.inputs, f"layer {site.layer_idx}")
    columns = site.columns.to(rows.device)
    return rows.detach()[columns], None if bias is None else bias.detach()[columns]
