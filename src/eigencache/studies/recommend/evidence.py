"""Why this advice: claims with their figures, each from a measurement of this very model; no table of model names.

A comparison differs in one thing only: the same rank and bits in another metric, another frame or another basis, the
same share of the full rank in another scope.
"""

from collections.abc import Iterable

from eigencache.records.advice import WORDS, Advice, Candidate, Evidence, Keys
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import Quality, SweepPoint, SweepRecord, SweepSeries


def evidence_of(advice: Advice, probe: ProbeRecord | None) -> list[Evidence]:
    """Line by line: architecture, the choice, its loss, bytes and basis, what was compared with it, keys, the probe."""
    lines = [
        Evidence(
            claim="what one token costs",
            figure=advice.model.geometry.describe(),
            source="the model's configuration and modules",
        )
    ]
    if advice.chosen:
        lines += _of_chosen(advice, advice.chosen)
    lines += [_of_other(advice, other) for other in advice.others]
    if advice.nearest:
        lines.append(_of_nearest(advice, advice.nearest))
    lines += _comparisons(advice)
    if advice.keys:
        lines += _of_keys(advice, advice.keys)
    elif not advice.model.geometry.mla and advice.model.geometry.key_bias is False:
        lines.append(Evidence(claim="keys have no bias", figure="in no layer", source="the model's modules"))
    return lines + (_of_probe(probe) if probe else [])


def loss(quality: Quality) -> str:
    """`ΔNLL 0.0071 nats [0.0050, 0.0093], perplexity +0.71 %`."""
    interval = quality.delta_nll_interval
    written = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else " (no interval)"
    return f"ΔNLL {quality.delta_nll:.4f} nats{written}, perplexity {100 * quality.perplexity_increase:+.2f} %"


def _behind(quality: Quality, corpus: str) -> str:
    return f"{corpus}: {quality.tokens:,} tokens scored in {quality.sequences} sequences"


def _of_chosen(advice: Advice, chosen: Candidate) -> list[Evidence]:
    claim = "chosen and stated on the same tokens"
    if advice.stating:
        claim = "chosen: on the choosing half its whole interval is within the budget"
    source = _behind(chosen.choosing, advice.choosing.name)
    lines = [Evidence(claim=claim, figure=loss(chosen.choosing), source=source)]
    if advice.stating and chosen.stating:
        found = {True: "is within the budget", False: "reaches above the budget", None: "cannot be told"}[advice.holds]
        lines.append(
            Evidence(
                claim=f"on the half that had no part in the choice its interval {found}",
                figure=loss(chosen.stating),
                source=_behind(chosen.stating, advice.stating.name),
            )
        )
    return [*lines, *_of_bytes(advice, chosen)]


def _of_bytes(advice: Advice, chosen: Candidate) -> list[Evidence]:
    geometry, quality = advice.model.geometry, chosen.choosing
    cached = "latent and rotary key" if geometry.mla else "K and V"
    held, whole = chosen.nbytes_per_token, chosen.sixteen_bit_nbytes_per_token
    lines = [
        Evidence(
            claim=f"bytes of {cached} per token of context",
            figure=f"{whole:,.0f} in 16 bits → {held:,.1f} held: ratio {quality.compression_ratio:.2f} "
            f"(of {WORDS[chosen.target]} alone {chosen.target_ratio:.2f})",
            source=f"nbytes of the tensors held, {quality.encoded_tokens:,} encoded tokens",
        ),
        Evidence(
            claim="the basis, held once, apart from that ratio",
            figure=f"{quality.basis_nbytes:,} bytes, paid back at {chosen.break_even_context:,} tokens of context",
            source="nbytes of means, encoders and decoders",
        ),
    ]
    if geometry.mla:
        expanded = 2 * geometry.expanded_values_per_token
        lines.append(
            Evidence(
                claim="the same against the keys and values that the latent expands to",
                figure=f"{expanded:,} bytes in 16 bits: ratio {expanded / held:.2f}",
                source="the model's configuration, and nbytes of the tensors held",
            )
        )
    return lines


def _of_other(advice: Advice, other: Candidate) -> Evidence:
    stated = f"; on the other half {loss(other.stating)}" if other.stating else ""
    return Evidence(
        claim=f"{WORDS[other.target]} alone goes less far: {other.describe()}",
        figure=f"ratio {other.choosing.compression_ratio:.2f} at {loss(other.choosing)}{stated}",
        source=_behind(other.choosing, advice.choosing.name),
    )


def _of_nearest(advice: Advice, closest: Candidate) -> Evidence:
    return Evidence(
        claim=f"the nearest to the budget: {closest.describe()}",
        figure=f"ratio {closest.choosing.compression_ratio:.2f} at {loss(closest.choosing)}",
        source=_behind(closest.choosing, advice.choosing.name),
    )


def _comparisons(advice: Advice) -> list[Evidence]:
    """What one change makes: metric, scope and frame from the widest sweep, bits and a random basis where tried."""
    best = advice.chosen or advice.nearest
    if best is None:
        return []
    lines: list[Evidence] = []
    wide = advice.sweeps.get("coarse") or advice.sweeps["given"]
    same = [s for s in wide.series if s.target == best.target and s.frame == "pre" and s.basis == "fitted"]
    lines += _varied(wide, [s for s in same if s.scope == best.scope], "metric", "the metric")
    lines += _varied(wide, [s for s in same if s.metric == best.metric], "scope", "the scope")
    keys = [s for s in wide.series if s.target == "k" and s.basis == "fitted" and s.scope == "head" and s.centered]
    after = {s.metric for s in keys if s.frame == "post"}
    lines += _varied(wide, [s for s in keys if s.metric in after], "frame", "the frame of K")
    narrow = advice.sweeps.get("fine") or advice.sweeps["given"]
    alike = [s for s in narrow.series if (s.target, s.scope, s.metric) == (best.target, best.scope, best.metric)]
    lines += _varied(narrow, [s for s in alike if s.frame == "pre" and s.basis == "fitted"], "bits", "the bits")
    if stated := advice.sweeps.get("stated"):
        control = next(s for s in stated.series if s.basis == "random").points[0].quality
        lines.append(
            Evidence(
                claim="the basis matters: a random one at the same rank and bits",
                figure=loss(control),
                source=_behind(control, stated.corpus.name),
            )
        )
    return lines


def _varied(sweep: SweepRecord, series: list[SweepSeries], by: str, what: str) -> list[Evidence]:
    """One line where series that differ in `by` have a share of their full rank in common: the losses side by side."""
    chosen: dict[str, SweepSeries] = {}
    for one in series:
        chosen.setdefault(str(getattr(one, by)), one)
    shared = _shared_share(chosen.values())
    if len(chosen) < 2 or not shared:
        return []
    points = {value: point for value, point in zip(chosen, shared, strict=True)}
    first = next(iter(points.values()))
    ranks = " / ".join(dict.fromkeys(str(point.rank) for point in points.values()))
    return [
        Evidence(
            claim=f"{what}, all else equal, rank {ranks}",
            figure=", ".join(f"{value}: KL {point.quality.kl:.4f} nats" for value, point in points.items()),
            source=_behind(first.quality, sweep.corpus.name),
        )
    ]


def _shared_share(series: Iterable[SweepSeries]) -> list[SweepPoint]:
    """One point of each series, at about the same share of the full rank: the middle of the shares they all have."""
    series = list(series)
    if not series:
        return []
    found = []
    for point in series[0].points:
        share = point.rank / series[0].width
        row = [min(s.points, key=lambda p, s=s: abs(p.rank / s.width - share)) for s in series]
        if all(abs(p.rank / s.width - share) <= max(0.1 * share, 0.5 / s.width) for p, s in zip(row, series, strict=True)):
            found.append(row)
    return found[len(found) // 2] if found else []


def _of_keys(advice: Advice, keys: Keys) -> list[Evidence]:
    largest = max(keys.biases, key=lambda bias: bias.share)
    corpus = advice.stating.name if advice.stating else advice.choosing.name
    lines = [
        Evidence(
            claim="keys have a bias",
            figure=f"largest in layer {largest.layer_idx}: its norm is {100 * largest.share:.0f} % of the mean norm "
            f"of the keys, its largest channel ×{largest.largest_to_median:.1f} the median",
            source=f"the model's weights; keys before rotation on {advice.calibration.name}",
        )
    ]
    found = {(rounding.kind, rounding.mean_out): rounding.quality for rounding in keys.roundings}
    for kind in dict.fromkeys(kind for kind, _ in found):
        left, out = found[kind, False], found[kind, True]
        source = _behind(left, corpus)
        for quality in (left, out):
            figure = f"{loss(quality)}, KL {quality.kl:.5f} nats, ratio {quality.compression_ratio:.2f}"
            lines.append(Evidence(claim=f"{quality.codec}, V in 16 bits", figure=figure, source=source))
        claim = f"taking the mean out {'lowers' if out.kl < left.kl else 'does not lower'} the KL of {kind} keys"
        lines.append(Evidence(claim=claim, figure=f"{left.kl:.5f} → {out.kl:.5f} nats", source=source))
    return lines


def _of_probe(probe: ProbeRecord) -> list[Evidence]:
    """Held-out energy of a quarter of the dimensions per tensor, as the probe found it: energy, not quality."""
    lines = []
    for name in probe.names:
        spectra = probe.select(name, "layer")
        quarters = [_quarter(s.held_out_energy, s.width) for s in spectra]
        energies = [energy for energy in quarters if energy is not None]
        if energies and len(energies) == len(spectra):
            lines.append(
                Evidence(
                    claim=f"probe: {name}, energy in a quarter of the dimensions (held out, per layer; not a quality)",
                    figure=f"{sum(energies) / len(energies):.3f}, mean over {len(energies)} layers, "
                    f"{min(s.support for s in spectra):.0f} independent vectors per dimension at least",
                    source=f"the given probe, {probe.corpus.name}, {probe.corpus.tokens:,} tokens",
                )
            )
    return lines


def _quarter(energy: dict[int, float] | None, width: int) -> float | None:
    """Held-out energy at the largest recorded k up to a quarter of the width."""
    known = [k for k in energy or {} if k <= width / 4]
    return energy[max(known)] if energy and known else None
