"""Collect the evidence for a recommendation: claims with figures, each measured on this model.

Each comparison changes one setting only. Metric, frame and basis are compared at the same rank and bits, and scopes at the
same fraction of the full rank.
"""

from collections.abc import Iterable

from eigencache.records.advice import WORDS, Advice, Candidate, Evidence, Keys
from eigencache.records.probe import ProbeRecord
from eigencache.records.quality import Quality, SweepPoint, SweepRecord, SweepSeries
from eigencache.studies.recommend.codec_claims import codec_evidence


def evidence_of(advice: Advice, probe: ProbeRecord | None) -> list[Evidence]:
    """Return the evidence in order: architecture, codecs, PCA choice, loss, bytes, basis, comparisons, keys and probe.

    Args:
        advice: Recommendation to explain.
        probe: Record of an earlier probe of the model, if there is one.
    """
    lines = [
        Evidence(
            claim="cache size per token",
            figure=advice.model.geometry.describe(),
            source="the model's configuration and modules",
        )
    ]
    lines += codec_evidence(advice)
    if advice.chosen:
        lines += _choice_lines(advice, advice.chosen)
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
    """Return the loss as text, such as `ΔNLL 0.0071 nats [0.0050, 0.0093], perplexity +0.71 %`."""
    interval = quality.delta_nll_interval
    bounds = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else " (no interval)"
    return f"ΔNLL {quality.delta_nll:.4f} nats{bounds}, perplexity {100 * quality.perplexity_increase:+.2f} %"


def _behind(quality: Quality, corpus: str) -> str:
    return f"{corpus}: {quality.tokens:,} tokens scored in {quality.sequences} sequences"


def _choice_lines(advice: Advice, chosen: Candidate) -> list[Evidence]:
    claim = "PCA: loss of the choice, on the same tokens it was chosen on"
    if advice.stating:
        claim = "PCA: loss of the choice on the validation half: the whole interval is within the budget"
    source = _behind(chosen.choosing, advice.choosing.name)
    lines = [Evidence(claim=claim, figure=loss(chosen.choosing), source=source)]
    if advice.stating and chosen.stating:
        verdicts = {True: "the interval is within the budget", False: "the interval exceeds the budget", None: "no interval"}
        lines.append(
            Evidence(
                claim=f"PCA: loss of the choice on the test half, not used for the choice: {verdicts[advice.holds]}",
                figure=loss(chosen.stating),
                source=_behind(chosen.stating, advice.stating.name),
            )
        )
    return [*lines, *_of_bytes(advice, chosen)]


def _of_bytes(advice: Advice, chosen: Candidate) -> list[Evidence]:
    geometry, quality = advice.model.geometry, chosen.choosing
    cached = "latent and rotary key" if geometry.mla else "K and V"
    encoded, sixteen_bit = chosen.nbytes_per_token, chosen.sixteen_bit_nbytes_per_token
    lines = [
        Evidence(
            claim=f"PCA: bytes of {cached} per token of context",
            figure=f"{sixteen_bit:,.0f} in 16 bits → {encoded:,.1f} compressed: ratio {quality.compression_ratio:.2f} "
            f"({chosen.target_ratio:.2f} for {WORDS[chosen.target]} alone)",
            source=f"nbytes of the stored tensors, {quality.encoded_tokens:,} encoded tokens",
        ),
        Evidence(
            claim="PCA: side information, stored once and not included in the ratio",
            figure=f"{quality.basis_nbytes:,} bytes, break-even context {chosen.break_even_context:,} tokens",
            source="nbytes of means, encoders and decoders",
        ),
    ]
    if geometry.mla:
        expanded = 2 * geometry.expanded_values_per_token
        lines.append(
            Evidence(
                claim="PCA: bytes per token relative to the keys and values that the latent expands to",
                figure=f"{expanded:,} bytes in 16 bits: ratio {expanded / encoded:.2f}",
                source="the model's configuration, and nbytes of the stored tensors",
            )
        )
    return lines


def _of_other(advice: Advice, other: Candidate) -> Evidence:
    stated = f"; on the test half {loss(other.stating)}" if other.stating else ""
    return Evidence(
        claim=f"compressing {WORDS[other.target]} alone gives a smaller ratio: {other.describe()}",
        figure=f"ratio {other.choosing.compression_ratio:.2f} at {loss(other.choosing)}{stated}",
        source=_behind(other.choosing, advice.choosing.name),
    )


def _of_nearest(advice: Advice, closest: Candidate) -> Evidence:
    return Evidence(
        claim=f"nearest to the budget: {closest.describe()}",
        figure=f"ratio {closest.choosing.compression_ratio:.2f} at {loss(closest.choosing)}",
        source=_behind(closest.choosing, advice.choosing.name),
    )


def _comparisons(advice: Advice) -> list[Evidence]:
    """Compare metric, scope and frame in the coarse sweep, bits in the fine sweep, and a random basis if measured."""
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
    """Compare series that differ in the field `by`, in one line, if they share a fraction of their full rank."""
    by_value: dict[str, SweepSeries] = {}
    for candidate in series:
        by_value.setdefault(str(getattr(candidate, by)), candidate)
    shared = _shared_share(by_value.values())
    if len(by_value) < 2 or not shared:
        return []
    points = {value: point for value, point in zip(by_value, shared, strict=True)}
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
    """Return one point per series at about the same fraction of the full rank: the middle one of those they share."""
    series = list(series)
    if not series:
        return []
    rows = []
    for point in series[0].points:
        share = point.rank / series[0].width
        row = [min(s.points, key=lambda p, s=s: abs(p.rank / s.width - share)) for s in series]
        if all(abs(p.rank / s.width - share) <= max(0.1 * share, 0.5 / s.width) for p, s in zip(row, series, strict=True)):
            rows.append(row)
    return rows[len(rows) // 2] if rows else []


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
    qualities = {(rounding.kind, rounding.mean_out): rounding.quality for rounding in keys.roundings}
    for kind in dict.fromkeys(kind for kind, _ in qualities):
        with_mean, without_mean = qualities[kind, False], qualities[kind, True]
        source = _behind(with_mean, corpus)
        for quality in (with_mean, without_mean):
            figure = f"{loss(quality)}, KL {quality.kl:.5f} nats, ratio {quality.compression_ratio:.2f}"
            lines.append(Evidence(claim=f"{quality.codec}, V in 16 bits", figure=figure, source=source))
        change = "lowers" if without_mean.kl < with_mean.kl else "does not lower"
        figure = f"{with_mean.kl:.5f} → {without_mean.kl:.5f} nats"
        claim = f"subtracting the mean {change} the KL of {kind} keys"
        lines.append(Evidence(claim=claim, figure=figure, source=source))
    return lines


def _of_probe(probe: ProbeRecord) -> list[Evidence]:
    """Return the held-out energy in a quarter of the dimensions, per tensor, from the probe; it is not a quality."""
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
                    f"at least {min(s.support for s in spectra):.0f} independent vectors per dimension",
                    source=f"the earlier probe, {probe.corpus.name}, {probe.corpus.tokens:,} tokens",
                )
            )
    return lines


def _quarter(energy: dict[int, float] | None, width: int) -> float | None:
    """Return the held-out energy at the largest recorded k of at most a quarter of the width."""
    known = [k for k in energy or {} if k <= width / 4]
    return energy[max(known)] if energy and known else None
