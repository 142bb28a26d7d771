"""Find attention sinks by what they do: the attention that first tokens receive, and the gradient of the loss at them.

In a pretrained model the first token is an attention sink. Most heads attend to it, and its key and value are small, so
norms do not reveal it. They are measured as well, because other tokens may have massive ones.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from eigencache.calibration.gradient_energy import GradientEnergy
from eigencache.calibration.metrics import spread_out
from eigencache.calibration.pass_memory import BACKWARD_TOKENS, backward_nbytes
from eigencache.calibration.session import Session
from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.corpora.sequences import Sequences
from eigencache.geometry import Layer
from eigencache.memory import release
from eigencache.models.attention_weights import AttentionWeights, attention_weights
from eigencache.models.capture import check_layers
from eigencache.models.gradients import cache_gradients
from eigencache.models.tapped_cache import tapped_cache
from eigencache.records.probe import LayerSinks, SinkStatistics, SlotSinks

TOKENS = 4096  # about as many tokens are read, evenly spaced over the text
DISTANCE = 16  # a query counts for positions at least this far before it; the nearest tokens have large shares in any model


def measure_sinks(
    session: Session, sequences: Sequences, layers: tuple[int, ...] | None = None, *, gradients: bool = False
) -> SinkStatistics:
    """Measure attention received and norms in one forward pass, and on request gradients in a forward and a backward pass.

    Memory holds 2^22 attention weights at a time, for any length of sequences. Layers with a window, and padding, also need
    a boolean mask [batch, seq, seq], as in any pass of the model.

    Args:
        session: the model and how it is run.
        sequences: the text; about 4,096 tokens of it are read.
        layers: layers to report; by default all that have a cache.
        gradients: measure gradient energy, if the memory of the session allows a backward pass.

    Raises:
        LayerError: a layer does not exist or has no cache.
    """
    chosen, text = check_layers(session.loaded.geometry, layers), spread_out(sequences, TOKENS)
    received, norms = _forward(session, text, chosen)
    needed = backward_nbytes(session.loaded, BACKWARD_TOKENS)
    energy = _backward(session, text) if gradients and needed <= session.memory else None
    described, reasons = [], _Reasons()
    for layer_idx in chosen:
        layer = session.loaded.geometry.layers[layer_idx]
        shares = received[layer_idx].shares() if layer_idx in received else None
        if shares is None:
            reasons.add(_reason(layer, heard=layer_idx in received), layer_idx)
        slots = [norms[layer_idx, s].described(_kind(norms, layer, s)) for s in (0, 1) if (layer_idx, s) in norms]
        if energy is not None:
            slots = [_with_energy(energy, (layer_idx, s), slot) for s, slot in enumerate(slots)]
        described.append(LayerSinks(layer_idx=layer_idx, **(shares or {}), slots=slots))
    lacking = (
        f"gradients were not measured: a backward pass needs about {needed / 2**30:.2g} GiB, more than a `memory` of "
        f"{session.memory / 2**30:.2g} GiB"
    )
    return SinkStatistics(
        sequences=len(text.ids),
        tokens=sum(map(len, text.ids)),
        layers=described,
        exact_tokens=None if energy is None else energy.sinks,
        reasons=[*reasons.sentences, *([lacking] if gradients and energy is None else [])],
    )


@dataclass(eq=False)
class Received:
    """Sums of the attention weights that positions of one layer receive.

    Attributes:
        kv_heads: KV heads.
        sums: Weights on each position [query heads, positions] float64.
        counts: Queries that they are sums over [query heads, positions].
        first: Weights on the first four positions [query heads, 4], of queries that count for all four.
        first_counts: Number of those queries [query heads, 1].
    """

    kv_heads: int
    sums: Tensor
    counts: Tensor
    first: Tensor
    first_counts: Tensor

    @classmethod
    def empty(cls, heads: int, kv_heads: int, positions: int) -> "Received":
        """Return sums over no queries."""
        return cls(kv_heads, *(torch.zeros(heads, n, dtype=torch.float64) for n in (positions, positions, FIRST_EXACT, 1)))

    def add(self, chunk: AttentionWeights, mask: Tensor) -> None:
        """Add the weights of a few queries. The weights of the chunk are changed.

        Args:
            chunk: The weights.
            mask: 1 for tokens and 0 for padding [batch, seq].
        """
        queries, keys = chunk.weights.shape[2:]
        stop, device = chunk.start + queries, chunk.weights.device
        distance = torch.arange(chunk.start, stop, device=device)[:, None] - torch.arange(keys, device=device)
        tokens = mask[:, None, chunk.start : stop, None].to(device=device, dtype=torch.bool)
        counted = chunk.visible & (distance >= DISTANCE) & tokens
        weights = chunk.weights.masked_fill_(~counted, 0.0)
        self.sums[:, :keys] += weights.sum((0, 2)).double().cpu()
        self.counts[:, :keys] += counted.sum((0, 2)).cpu()
        if keys >= FIRST_EXACT:
            four = counted[..., :FIRST_EXACT].all(-1, keepdim=True)
            self.first += (weights[..., :FIRST_EXACT] * four).sum((0, 2)).double().cpu()
            self.first_counts += four.sum((0, 2)).cpu()

    def shares(self) -> dict[str, list] | None:
        """Return the fields of `LayerSinks`; None if no query that is far enough sees the first four tokens."""
        sums, counts, first, first_counts = (
            x.unflatten(0, (self.kv_heads, -1)).sum(1) for x in (self.sums, self.counts, self.first, self.first_counts)
        )
        if not first_counts.all():
            return None
        first /= first_counts
        others = (sums / counts).masked_fill(counts < first_counts / 2, -torch.inf)
        others[:, :FIRST_EXACT] = -torch.inf
        share, position = others.max(-1)
        known = share.isfinite()
        return {
            "first_share": first[:, 0].tolist(),
            "first_four_share": first.sum(1).tolist(),
            "other_share": share.where(known, 0.0).tolist(),
            "other_position": position.where(known, -1).tolist(),
        }


@dataclass(eq=False)
class _Norms:
    """Norms of the vectors of one slot: [heads, tokens] per batch, with the positions [tokens] of the tokens."""

    dim: int
    norms: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, mask: Tensor) -> None:
        """Add the vectors [batch, heads, seq, dim] of a batch, without padding (`mask` [batch, seq] 0)."""
        kept = mask.bool()
        self.norms.append(x.float().norm(dim=-1).transpose(0, 1).cpu()[:, kept])
        self.positions.append(torch.arange(x.shape[2]).expand(len(x), -1)[kept])

    def described(self, kind: str) -> SlotSinks:
        """Return the norms of the first token, the median and the largest."""
        norms, positions = torch.cat(self.norms, 1), torch.cat(self.positions)
        largest, token = norms.max(1)
        return SlotSinks(
            kind=kind,
            first_norm=norms[:, positions == 0].mean(1).tolist(),
            median_norm=norms.median(1).values.tolist(),
            largest_norm=largest.tolist(),
            largest_position=positions[token].tolist(),
        )


@torch.no_grad()
def _forward(
    session: Session, text: Sequences, layers: tuple[int, ...]
) -> tuple[dict[int, Received], dict[tuple[int, int], _Norms]]:
    """Return the attention received by layer, and the norms by layer and slot."""
    model, device = session.loaded.model, session.loaded.device
    received: dict[int, Received] = {}
    norms: dict[tuple[int, int], _Norms] = {}
    longest, done = max(map(len, text.ids)), 0
    for input_ids, mask, indices in text.batches(session.batch_size, pad_id=0):

        def listen(chunk: AttentionWeights, mask: Tensor = mask) -> None:
            if chunk.layer_idx in layers:
                empty = Received.empty(chunk.weights.shape[1], chunk.kv_heads, longest)
                received.setdefault(chunk.layer_idx, empty).add(chunk, mask)

        cache, stored = tapped_cache(model)
        given = None if bool(mask.all()) else mask.to(device)
        with attention_weights(model, listen):
            model.base_model(input_ids=input_ids.to(device), attention_mask=given, past_key_values=cache, use_cache=True)
        for layer_idx in stored.keys() & set(layers):
            for slot, x in enumerate(stored[layer_idx]):
                if x.shape[-1]:  # MLA without a rotary key stores vectors of dimension 0
                    norms.setdefault((layer_idx, slot), _Norms(x.shape[-1])).add(x, mask)
        del cache, stored
        release()
        done += len(indices)
        session.on_progress("attention sinks", done, len(text.ids))
    return received, norms


def _backward(session: Session, text: Sequences) -> GradientEnergy:
    """Return the gradient energy of the first 512 tokens of every sequence; longer ones are cut to limit memory."""
    device, energy, done = session.loaded.device, GradientEnergy(), 0
    text = replace(text, ids=[ids[:BACKWARD_TOKENS] for ids in text.ids])
    rows = min(session.batch_size, max(1, BACKWARD_TOKENS // max(map(len, text.ids))))
    for input_ids, mask, indices in text.batches(rows, pad_id=0):
        given = None if bool(mask.all()) else mask.to(device)
        energy.add(cache_gradients(session.loaded.model, input_ids.to(device), given), mask.sum(1).tolist())
        release()
        done += len(indices)
        session.on_progress("gradients", done, len(text.ids))
    return energy


def _with_energy(energy: GradientEnergy, place: tuple[int, int], slot: SlotSinks) -> SlotSinks:
    found = {
        "gradient_energy": energy.by_position(place),
        "gradient_energy_rest": energy.rest(place),
        "gradient_share": energy.share(place),
    }
    return slot.model_copy(update=found)


def _kind(norms: dict[tuple[int, int], _Norms], layer: Layer, slot: int) -> str:
    """Return the kind of tensor in a slot: older transformers store MLA as expanded keys and values."""
    latent = layer.mla is not None and norms[layer.layer_idx, 0].dim == layer.mla.kv_lora_rank
    return (("latent", "key_rope") if latent else ("keys", "values"))[slot]


class _Reasons:
    """Sentences, each with the layers that it applies to."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    def add(self, what: str, layer_idx: int) -> None:
        """Add a layer to a sentence."""
        self._layers.setdefault(what, []).append(layer_idx)

    @property
    def sentences(self) -> list[str]:
        """The sentences, the first that was added first."""
        return [f"layers {', '.join(map(str, layers))}: {what}" for what, layers in self._layers.items()]


def _reason(layer: Layer, *, heard: bool) -> str:
    """Return why the attention of a layer was not measured."""
    if not heard:
        return "attention was not measured: the model does not compute it by transformers' AttentionInterface"
    window = f" (its window is {layer.window} tokens)" if layer.window else ""
    return f"no query at least {DISTANCE} positions later attends to all of the first {FIRST_EXACT} tokens{window}"
