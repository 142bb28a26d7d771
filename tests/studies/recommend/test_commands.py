"""The commands of a recommendation are words that a shell splits as they were meant."""

import shlex

from eigencache.fitting.live import SAFE
from eigencache.records.advice import Budget
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.recommend import recommend_sweep
from planted_sweeps import series, sweep

TEXT = ("--text", "my text.txt", "--tokens", "4096", "--max-length", "128")
RECIPE = Recipe("models/Qwen2.5-0.5B.gguf", "my text.txt", 4096, 128, dtype="bfloat16")


def test_a_codec_is_fitted_on_the_calibration_text_at_its_rate() -> None:
    start, end = ("eigencache", "fit", RECIPE.model), ("--dtype", "bfloat16")
    assert tuple(shlex.split(RECIPE.codec("eigen", 0.488))) == (
        *start, "--bits", "0.488", *TEXT, "-o", "Qwen2.5-0.5B-eigen", *end
    )  # fmt: skip
    assert tuple(shlex.split(RECIPE.codec("live", 3.125))) == (
        *start, "--live-only", "--live-bits", "3.125", *TEXT, "-o", "Qwen2.5-0.5B-live", *end
    )  # fmt: skip
    assert shlex.split(RECIPE.codec("live", SAFE))[3:5] == ["--live-only", "--safe"]


def test_a_pca_codec_is_saved_by_an_evaluation_and_an_uncentered_one_by_no_command() -> None:
    centered = series("k", (8, 1.8, 0.001, 0.001), frame="post", scope="layer", bits=4)
    advice = recommend_sweep(sweep(centered), Budget(nats=0.01, given="planted"), "sweep.json")
    assert advice.chosen
    words = shlex.split(advice.chosen.command)
    assert words[:3] == ["eigencache", "evaluate", "planted-model"] and words[-2:] == ["--dtype", "float32"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    wanted = {"--target": "k", "--scope": "layer", "--frame": "post", "--metric": "fisher", "--bits": "4", "--ranks": "8"}
    assert wanted.items() <= options.items()
    assert (options["--calibration-text"], options["--calibration-tokens"]) == ("planted", "40960")
    assert RECIPE.pca(advice.chosen.model_copy(update={"centered": False})) == ""
