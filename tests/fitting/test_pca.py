"""Every way of compressing every cache: full rank changes nothing, low rank does; too little text is refused."""

import pytest

from eigencache.calibration.session import Session
from eigencache.errors import CodecError, StatisticsError, UnsupportedArchitectureError
from eigencache.evaluate.likelihood import score_through_cache
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings, targets_of, width_of
from eigencache.records.quality import ReadingProtocol

pytestmark = pytest.mark.slow

LENGTHS = (64,) * 32
SCOPES = ("head", "layer", "all")
NAMES = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt_neox", "deepseek_v2", "deepseek_v3")
_SHARED: dict[str, PCACalibration] = {}


@pytest.fixture
def calibration(loaded, sequences):
    def make(name: str) -> PCACalibration:
        if name not in _SHARED:
            _SHARED[name] = PCACalibration(Session(loaded(name)), sequences(*LENGTHS), scopes=SCOPES)
        return _SHARED[name]

    return make


def divergence(calibration: PCACalibration, codec, sequences) -> float:
    text, protocol = sequences(40, 40, seed=1), ReadingProtocol(kind="prefix", length=20)
    scored = list(score_through_cache(Session(calibration.session.loaded), text, {"codec": codec}, protocol))
    losses = [loss for batch in scored for loss in batch.losses["codec"]]
    return sum(loss.kl for loss in losses) / sum(loss.tokens for loss in losses)


@pytest.mark.parametrize("metric", ["frobenius", "attention", "fisher"])
@pytest.mark.parametrize("name", NAMES)
def test_full_rank_changes_nothing_and_low_rank_does(name: str, metric: str, calibration, sequences) -> None:
    calibrated = calibration(name)
    for target in targets_of(calibrated.session.loaded):
        scopes = SCOPES if name in ("llama", "deepseek_v2") else ("head",)
        for scope in scopes:
            for frame in ("pre", "post"):
                codec = calibrated.fit(PCASettings(target, scope, frame, metric))
                assert divergence(calibrated, codec, sequences) < 1e-4, (target, scope, frame)
                assert divergence(calibrated, codec.truncated(1), sequences) > 1e-3, (target, scope, frame)


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_alone_tells_the_full_rank(name: str, calibration) -> None:
    calibrated = calibration(name)
    for target in targets_of(calibrated.session.loaded):
        for scope in SCOPES:
            settings = PCASettings(target, scope)
            assert width_of(calibrated.session.loaded.geometry, settings) == calibrated.fit(settings).rank


def test_uncentered_and_tempered_and_controls_are_other_bases(calibration, sequences) -> None:
    calibrated = calibration("llama")
    ways = [
        PCASettings("v"),
        PCASettings("v", centered=False),
        PCASettings("v", metric="fisher"),
        PCASettings("v", metric="fisher", alpha=0.5),
        PCASettings("v", basis="pooled"),
        PCASettings("v", basis="random"),
    ]
    found = [divergence(calibrated, calibrated.fit(way).truncated(8), sequences) for way in ways]
    assert len(set(found)) == len(ways)
    assert len({way.describe() for way in ways}) == len(ways)


def test_pooled_heads_share_one_basis(calibration) -> None:
    calibrated = calibration("llama")
    pooled, apart = (calibrated.fit(PCASettings("v", basis=basis)) for basis in ("pooled", "fitted"))
    heads = calibrated.session.loaded.geometry.num_key_value_heads
    assert apart.nbytes == heads * pooled.nbytes


@pytest.mark.parametrize(("name", "target", "words"), [
    ("deepseek_v2", "v", "does not cache values: it caches key_rope and latent"),
    ("llama", "latent", "does not cache latent: it caches keys and values"),
])  # fmt: skip
def test_a_target_that_is_not_cached_is_refused(name: str, target: str, words: str, calibration) -> None:
    with pytest.raises(CodecError, match=words):
        calibration(name).fit(PCASettings(target))  # type: ignore[arg-type]


def test_too_little_text_is_refused_with_n_eff_and_what_to_do(loaded, sequences) -> None:
    scarce = PCACalibration(Session(loaded("llama")), sequences(24), scopes=("head", "layer"))
    says = r"values, layer 0: n_eff of \d+ independent vectors cannot carry .* Use more calibration tokens"
    with pytest.raises(StatisticsError, match=says + " or a narrower scope"):
        scarce.fit(PCASettings("v", scope="layer"))
    with pytest.raises(StatisticsError, match=says + r"\."):
        PCACalibration(scarce.session, sequences(12)).fit(PCASettings("v", scope="head"))
    with pytest.raises(StatisticsError, match="scope all was not captured"):
        scarce.fit(PCASettings("v", scope="all"))


def test_models_whose_rotation_is_unknown_are_refused(loaded, sequences) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="could not be identified"):
        PCACalibration(Session(loaded("gptj")), sequences(*LENGTHS)).fit(PCASettings("k"))
