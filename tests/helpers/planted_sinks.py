"""A record of attention sinks with known numbers."""

from eigencache.records.probe import LayerSinks, SinkStatistics, SlotSinks


def planted_sinks(layers: int, heads: int) -> SinkStatistics:
    """A first token with 0.4, 0.5, … of the attention of head 0, 1, …, 0.05 more in every layer, and with small vectors."""
    slots = [
        SlotSinks(
            kind=kind,
            first_norm=[5.0 + head for head in range(heads)],
            median_norm=[20.0] * heads,
            largest_norm=[400.0 if kind == "keys" and head == 0 else 30.0 for head in range(heads)],
            largest_position=[37 + head for head in range(heads)],
            gradient_energy=[9.0] + [0.1] * 15,
            gradient_energy_rest=0.01,
            gradient_share=0.75 if kind == "keys" else 0.875,
        )
        for kind in ("keys", "values")
    ]
    found = [
        LayerSinks(
            layer_idx=i,
            first_share=[0.4 + 0.1 * head + 0.05 * i for head in range(heads)],
            first_four_share=[0.45 + 0.1 * head + 0.05 * i for head in range(heads)],
            other_share=[0.01 * (head + 1) for head in range(heads)],
            other_position=[90 + head for head in range(heads)],
            slots=slots,
        )
        for i in range(layers)
    ]
    return SinkStatistics(sequences=8, tokens=1024, layers=found, exact_tokens=4)
