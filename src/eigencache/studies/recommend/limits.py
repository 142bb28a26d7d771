"""What an advice does not know, from its own situation: what was left out or not tried, how little stood behind it."""

from eigencache.fitting.pca import Target
from eigencache.geometry import KVGeometry
from eigencache.records.advice import WORDS, Advice, Candidate
from eigencache.studies.recommend.candidates import METRICS, targets_and_scopes

SMALL = 1_000_000_000  # parameters
FEW_SEQUENCES = 30
WEAK_NLL = 3.0  # nats per token: perplexity of 20


def limits_of(advice: Advice, left_out: list[str]) -> list[str]:
    """One line each; `left_out`: what could not be tried, with the reason."""
    return [
        *_of_result(advice),
        *_of_model(advice),
        *_of_text(advice),
        *_of_search(advice),
        *(f"not tried: {x}" for x in left_out),
    ]


def _of_result(advice: Advice) -> list[str]:
    lines = []
    if advice.stating is None:
        lines.append("chosen and stated on the same tokens: the best of several looks better than it is")
    elif advice.holds is False:
        lines.append("the stated interval reaches above the budget: a smaller ratio or more --tokens would make it certain")
    if advice.chosen:
        lines += _of_chosen(advice, advice.chosen)
    stated = advice.chosen.stating or advice.chosen.choosing if advice.chosen else None
    behind = stated or (advice.nearest.choosing if advice.nearest else None)
    if behind and behind.sequences < FEW_SEQUENCES:
        lines.append(f"intervals rest on {behind.sequences} sequences: more --tokens make them narrower, and may allow more")
    return lines


def _of_chosen(advice: Advice, chosen: Candidate) -> list[str]:
    lines = []
    sweep = advice.sweeps.get("fine") or advice.sweeps["given"]
    series = next(s for s in sweep.series if any(point.quality.codec == chosen.name for point in s.points))
    if chosen.rank == series.points[0].rank > 1:
        lines.append(f"rank {chosen.rank} is the lowest that was tried in this way: lower ones may qualify too")
    quality = chosen.stating or chosen.choosing
    if quality.kl > advice.budget.nats:
        lines.append(
            f"KL is {quality.kl:.4f} nats, more than the budget: predictions change, even where their loss does not, "
            "and what that does to generated text was not measured"
        )
    return lines


def _of_model(advice: Advice) -> list[str]:
    lines, model = [], advice.model
    if model.parameters < SMALL:
        lines.append(f"a model of {model.parameters:,} parameters: nothing here is about larger models of its architecture")
    if not model.geometry.mla and model.geometry.width_ratio > 1:
        lines.append(
            f"KV width / hidden size is {model.geometry.width_ratio:.2f}: part of this cache is redundant by algebra, "
            "so models with a narrower cache may allow less"
        )
    if advice.uncompressed_nll > WEAK_NLL:
        lines.append(
            f"the model predicts this text with {advice.uncompressed_nll:.2f} nats per token uncompressed: "
            "one that predicts better may need more of its cache"
        )
    return lines


def _of_text(advice: Advice) -> list[str]:
    name = advice.choosing.name.split(", sequences ")[0]
    lines = [
        f"one text, {name}: other texts, languages and tasks were not measured",
        f"contexts of up to {advice.choosing.max_length:,} tokens: whether the loss grows in longer ones was not measured",
    ]
    if advice.protocol.kind == "prefix":
        lines.append(
            f"the prefix of {advice.protocol.length:,} tokens was encoded once and read: nothing was generated, "
            "nothing retrieved, and no time was measured"
        )
    return lines


def _of_search(advice: Advice) -> list[str]:
    """Ways that would have been possible and were not measured."""
    series = [s for sweep in advice.sweeps.values() for s in sweep.series if s.basis == "fitted"]
    tried = {s.target for s in series}
    wanted, _ = targets_and_scopes(advice.model.geometry)
    lines = [f"not measured: {WORDS[target]}" for target in wanted if target not in tried]
    lines += _given_only(advice, wanted) if "given" in advice.sweeps else []
    if advice.model.geometry.mla:
        lines.append("latent and rotary key were compressed one at a time, not together")
    elif "kv" in tried:
        lines.append("K and V together had the same rank: unequal ranks may go further")
    if "attention" not in {s.metric for s in series}:
        lines.append("the attention metric was not tried")
    if {s.alpha for s in series} == {1.0}:
        lines.append("powers of a metric were not tried")
    if advice.keys is None and advice.model.geometry.key_bias is not False:
        lines.append(_keys_unknown(advice.model.geometry))
    return [line for line in lines if line]


def _given_only(advice: Advice, wanted: dict[Target, tuple]) -> list[str]:
    """What a sweep has not measured of the scopes, metrics and bits that a measurement of the model would try."""
    series = advice.sweeps["given"].series
    lines = []
    possible = dict.fromkeys(scope for scopes in wanted.values() for scope in scopes)
    for what, known, values in (
        ("scope", {s.scope for s in series}, possible),
        ("metric", {s.metric for s in series}, METRICS),
        ("coefficients in", {s.bits for s in series}, (16, 8, 4)),
    ):
        if missing := [str(value) for value in values if value not in known]:
            unit = " bits" if what == "coefficients in" else ""
            lines.append(f"not measured: {what} {', '.join(missing)}{unit}")
    return lines


def _keys_unknown(geometry: KVGeometry) -> str:
    if geometry.mla:
        return "a bias in the projection to the latent was not looked at" if geometry.key_bias else ""
    if geometry.key_bias:
        return "the keys have a bias, and what it does to fp8 and int8 keys was not measured"
    return "whether the keys have a bias is not known"
