"""List the limits of a recommendation: settings that were not measured, small samples and untested conditions."""

from eigencache.fitting.pca_settings import Target
from eigencache.geometry import KVGeometry
from eigencache.records.advice import WORDS, Advice, Candidate
from eigencache.studies.recommend.candidates import METRICS, targets_and_scopes
from eigencache.studies.recommend.codec_claims import codec_limits

SMALL = 1_000_000_000  # parameters
FEW_SEQUENCES = 30
WEAK_NLL = 3.0  # nats per token: perplexity of 20


def limits_of(advice: Advice, left_out: list[str]) -> list[str]:
    """Return one sentence per limit.

    Args:
        advice: Recommendation to qualify.
        left_out: Settings that could not be tried, each with its reason.
    """
    return [
        *_of_result(advice),
        *_of_model(advice),
        *_of_text(advice),
        *codec_limits(advice),
        *(_of_search(advice) if advice.sweeps else [f"not measured: PCA ({advice.pca_refusal or 'not asked for'})"]),
        *(f"not tried: {reason}" for reason in left_out),
    ]


def _of_result(advice: Advice) -> list[str]:
    lines = []
    if advice.stating is None:
        lines.append("the loss is reported on the tokens used for the choice: the best of several is biased downwards")
    elif advice.holds is False:
        lines.append(
            "PCA: the interval on the test half exceeds the budget: use a smaller ratio, or more tokens for certainty"
        )
    if advice.chosen:
        lines += _of_chosen(advice, advice.chosen)
    reported = advice.chosen.stating or advice.chosen.choosing if advice.chosen else None
    quality = reported or (advice.nearest.choosing if advice.nearest else None)
    quality = quality or next((c.choosing for one in advice.codecs for c in one.candidates), None)
    if quality and quality.delta_nll_interval and quality.sequences < FEW_SEQUENCES:
        lines.append(
            f"intervals come from only {quality.sequences} sequences: more tokens narrow them and may allow a larger ratio"
        )
    return lines


def _of_chosen(advice: Advice, chosen: Candidate) -> list[str]:
    lines = []
    sweep = advice.sweeps.get("fine") or advice.sweeps["given"]
    series = next(s for s in sweep.series if any(point.quality.codec == chosen.name for point in s.points))
    if chosen.rank == series.points[0].rank > 1:
        lines.append(f"PCA: rank {chosen.rank} is the lowest rank tried with these settings: lower ranks may also qualify")
    quality = chosen.stating or chosen.choosing
    if quality.kl > advice.budget.nats:
        lines.append(
            f"PCA: KL is {quality.kl:.4f} nats, more than the budget: predictions change even where the loss does not, "
            "and the effect on generated text was not measured"
        )
    return lines


def _of_model(advice: Advice) -> list[str]:
    lines, model = [], advice.model
    if model.parameters < SMALL:
        lines.append(
            f"the model has {model.parameters:,} parameters: results may not hold for larger models of its architecture"
        )
    if not model.geometry.mla and model.geometry.width_ratio > 1:
        lines.append(
            f"KV width / hidden size is {model.geometry.width_ratio:.2f}: part of this cache is redundant by algebra, "
            "so models with a narrower cache may compress less"
        )
    if advice.uncompressed_nll > WEAK_NLL:
        lines.append(
            f"the model's loss on this text is {advice.uncompressed_nll:.2f} nats per token uncompressed: "
            "a model that predicts better may need more of its cache"
        )
    return lines


def _of_text(advice: Advice) -> list[str]:
    name = advice.choosing.name.split(", sequences ")[0]
    lines = [
        f"only one text was measured, {name}: other texts, languages and tasks may differ",
        f"contexts have at most {advice.choosing.max_length:,} tokens: the loss in longer contexts was not measured",
    ]
    if advice.protocol.kind == "prefix":
        lines.append(
            f"the prefix of {advice.protocol.length:,} tokens was encoded once and read: generation, retrieval and speed "
            "were not measured"
        )
    return lines


def _of_search(advice: Advice) -> list[str]:
    """List settings that the model allows and that were not measured."""
    series = [s for sweep in advice.sweeps.values() for s in sweep.series if s.basis == "fitted"]
    tried = {s.target for s in series}
    wanted = targets_and_scopes(advice.model.geometry)
    lines = [f"not measured: {WORDS[target]}" for target in wanted if target not in tried]
    lines += _given_only(advice, wanted) if "given" in advice.sweeps else []
    if advice.model.geometry.mla:
        lines.append("the latent and the rotary key were compressed separately, not together")
    elif "kv" in tried:
        lines.append("K and V had the same rank when compressed together: unequal ranks may compress more")
    if "attention" not in {s.metric for s in series}:
        lines.append("the attention metric was not tried")
    if {s.alpha for s in series} == {1.0}:
        lines.append("exponents of a metric other than 1 were not tried")
    if advice.keys is None and advice.model.geometry.key_bias is not False:
        lines.append(_keys_unknown(advice.model.geometry))
    return [line for line in lines if line]


def _given_only(advice: Advice, wanted: dict[Target, tuple]) -> list[str]:
    """List the scopes, metrics and bit widths that `recommend` would try and that the given sweep lacks."""
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
        return "the projection to the latent has a bias, whose effect was not measured" if geometry.key_bias else ""
    if geometry.key_bias:
        return "the keys have a bias, and its effect on fp8 and int8 keys was not measured"
    return "it is unknown whether the keys have a bias"
