"""State the evidence for the recommended codecs `eigen` and `live`, and what limits it."""

from eigencache.records.advice import Advice, CodecAdvice, CodecCandidate, Evidence
from eigencache.records.quality import Quality


def codec_evidence(advice: Advice) -> list[Evidence]:
    """Return the losses of the chosen codec of every family, and of the next lower rate, which shows the edge."""
    lines: list[Evidence] = []
    for one in advice.codecs:
        if one.chosen:
            lines += _of_chosen(advice, one, one.chosen)
        elif one.nearest:
            claim = f"{one.family}: no rate is within the budget; the nearest is {one.nearest.describe()}"
            lines.append(_evidence(claim, one.nearest.choosing, advice.choosing.name))
    return lines


def codec_limits(advice: Advice) -> list[str]:
    """Return one sentence per limit of the codecs, and one per rate or family that was not measured."""
    lines = []
    for one in advice.codecs:
        if one.chosen:
            lines += _limits_of_chosen(advice, one, one.chosen)
        lines += [f"not measured: {reason}" for reason in one.left_out]
    return lines


def loss_and_kl(quality: Quality) -> str:
    """Return the loss as text, such as `ΔNLL 0.0021 nats [-0.0013, 0.0055], KL 0.0064 nats [0.0058, 0.0071]`."""
    parts = []
    for name, value, ends in (
        ("ΔNLL", quality.delta_nll, quality.delta_nll_interval),
        ("KL", quality.kl, quality.kl_interval),
    ):
        parts.append(f"{name} {value:.4f} nats" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else " (no interval)"))
    return ", ".join(parts)


def _of_chosen(advice: Advice, one: CodecAdvice, chosen: CodecCandidate) -> list[Evidence]:
    name = chosen.describe()
    claim = f"{name}: loss on the same tokens it was chosen on"
    if advice.stating:
        claim = f"{name}: loss on the validation half: the whole interval is within the budget"
    lines = [_evidence(claim, chosen.choosing, advice.choosing.name)]
    if advice.stating and chosen.stating:
        holds = {True: "the interval is within the budget", False: "the interval exceeds the budget", None: "no interval"}
        claim = f"{name}: loss on the test half, not used for the choice: {holds[chosen.holds(advice.budget)]}"
        lines.append(_evidence(claim, chosen.stating, advice.stating.name))
    ratio = chosen.choosing.compression_ratio
    smaller = [c for c in one.candidates if c.choosing.compression_ratio > ratio]
    if smaller:
        below = min(smaller, key=lambda c: c.choosing.compression_ratio)
        lines.append(_evidence(f"{below.describe()}: not within the budget", below.choosing, advice.choosing.name))
    return lines


def _evidence(claim: str, quality: Quality, corpus: str) -> Evidence:
    source = f"{corpus}: {quality.tokens:,} tokens scored in {quality.sequences} sequences"
    return Evidence(claim=claim, figure=f"ratio {quality.compression_ratio:.2f} at {loss_and_kl(quality)}", source=source)


def _limits_of_chosen(advice: Advice, one: CodecAdvice, chosen: CodecCandidate) -> list[str]:
    lines, name, quality = [], chosen.describe(), chosen.stating or chosen.choosing
    if all(c.choosing.compression_ratio <= chosen.choosing.compression_ratio for c in one.candidates):
        lines.append(f"{name}: the lowest rate measured: lower rates may also qualify")
    if chosen.holds(advice.budget) is False:
        lines.append(f"{name}: the interval on the test half exceeds the budget: use a higher rate, or more tokens")
    if quality.kl > advice.budget.nats:
        lines.append(
            f"{name}: KL is {quality.kl:.4f} nats, more than the budget: predictions change even where the loss does not"
        )
    return lines
