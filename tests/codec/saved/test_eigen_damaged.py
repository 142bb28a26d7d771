"""A damaged `eigen` codec is refused naming the file and what is wrong, and what could not be read back is not written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS, Damage, assert_refused, at, card, put, tensors
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.eigen.transform import Stage
from eigencache.codec.saved.eigen_card import EigenCardSettings
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec, save_codec
from eigencache.errors import CodecError
from saved_eigen import EXPECTED, about, planted, saved


def wrapped(starts: Tensor) -> Tensor:
    """Edges whose differences are positive in 32 bits only."""
    starts[0] = 4096
    starts[0, :5] = torch.tensor([0, 2**31 - 1, -(2**31), -1, 4096], dtype=torch.int32)
    return starts


def stage(place: int, **changed: Any) -> Damage:
    return card(lambda c: c["stages"][place].update(changed))


UNCOVERED = "the stages do not cover columns 0 to 40 one after the other"


CARD_DAMAGES: dict[str, tuple[Damage, str]] = {
    "another kind": (
        card(lambda c: c.update(kind="zip")),
        "kind 'zip' is unknown to this version, which reads eigen, live, pca",
    ),
    "the other kind": (card(lambda c: c.update(kind="pca")), "schema eigencache.codec/1: settings.target: Field required"),
    "another schema": (card(lambda c: c.update(schema_version="eigencache.codec/2")), "should be 'eigencache.codec/1'"),
    "unknown field": (card(lambda c: c.update(extra=1)), "extra: Extra inputs"),
    "no promise": (card(lambda c: c.pop("expected")), "expected: Field required"),
    "half a promise": (card(lambda c: c["expected"].pop("kl")), "expected.kl: Field required"),
    "infinite loss": (card(lambda c: c["expected"].update(delta_nll="inf")), "expected.delta_nll"),
    "more than all": (card(lambda c: c["expected"].update(top1_agreement=1.1)), "expected.top1_agreement"),
    "interval": (card(lambda c: c["expected"].update(delta_nll_interval=[1, 0])), "the expected interval ends before"),
    "scope": (
        card(lambda c: c["settings"].update(scope="all")),
        "settings.scope: Input should be 'head', 'layer', 'groups'",
    ),
    "of an earlier day": (card(lambda c: c["settings"].pop("group")), "settings.group: Field required"),
    "no group": (card(lambda c: c["settings"].update(group=0)), "settings.group: Input should be greater than 0"),
    "nothing shared": (
        card(lambda c: c["settings"].update(amortize=0)),
        "settings.amortize: Input should be greater than 0",
    ),
    "no step": (card(lambda c: c.update(step=0)), "step: Input should be greater than 0"),
    "endless step": (card(lambda c: c.update(step="inf")), "step: Input should be a finite number"),
    "another step": (card(lambda c: c.update(step=0.31)), "describes codec "),
    "no lane": (card(lambda c: c.update(lanes=0)), "lanes: Input should be greater than or equal to 1"),
    "many lanes": (card(lambda c: c.update(lanes=33)), "lanes: Input should be less than or equal to 32"),
    "no block": (card(lambda c: c.update(block=0)), "block: Input should be greater than or equal to 1"),
    "long block": (card(lambda c: c.update(block=2**16)), "block: Input should be less than or equal to 65535"),
    "another block": (card(lambda c: c.update(block=17)), "text, kept tokens or block are not what the settings say"),
    "kept bits": (card(lambda c: c["kept"].update(bits=4)), "kept.bits: Input should be 16 or 8"),
    "no hash": (card(lambda c: c.update(codec_sha256="1")), "codec_sha256: String should match pattern"),
    "another hash": (card(lambda c: c.update(codec_sha256="1" * 64)), "not 111111111111 as it says"),
    "no parts": (card(lambda c: c.update(parts=[])), "parts: List should have at least 1 item"),
    "part twice": (card(lambda c: c["parts"].append(c["parts"][0])), "do not cover the heads of layer 0, slot 0 once each"),
    "slot lost": (card(lambda c: c["parts"].pop()), "layer 1 has no slot 1"),
    "rotated twice": (card(lambda c: c["rotations"][1].update(layer_idx=0)), "a layer is rotated twice"),
    "too many pairs": (card(lambda c: c["rotations"][0].update(pairs=3)), "layer 0, slot 0 has no 3 pairs"),
    "no stages": (card(lambda c: c.update(stages=[])), "stages: List should have at least 1 item"),
    "not the first column": (stage(0, start=1), UNCOVERED),
    "overlap": (stage(-1, start=33), UNCOVERED),
    "gap": (stage(-1, start=35), UNCOVERED),
    "short": (stage(-1, stop=39), UNCOVERED),
    "long": (stage(-1, stop=41), UNCOVERED),
    "backward": (stage(-1, stop=34), UNCOVERED),
    "no columns": (card(lambda c: (c["stages"][3].update(stop=14), c["stages"][4].update(start=14))), UNCOVERED),
    "back and forth": (card(lambda c: (c["stages"][3].update(stop=10), c["stages"][4].update(start=10))), UNCOVERED),
    "swapped": (card(lambda c: c["stages"].reverse()), UNCOVERED),
    "stage lost": (card(lambda c: c["stages"].pop(3)), UNCOVERED),
    "before the first column": (stage(0, start=-1), "stages.0.start: Input should be greater than or equal to 0"),
    "empty stage": (stage(0, stop=0), "stages.0.stop: Input should be greater than 0"),
    "fewer than none": (stage(2, fine=-1), "stages.2.fine: Input should be greater than or equal to 0"),
    "fewer coarse than none": (stage(2, coarse=-1), "stages.2.coarse: Input should be greater than or equal to 0"),
    "too many fine": (stage(-1, fine=5), "a stage of 6 columns has 7 coefficients"),
    "too many coarse": (stage(1, coarse=4), "a stage of 4 columns has 5 coefficients"),
    "none": (card(lambda c: [s.update(fine=0, coarse=0) for s in c["stages"]]), "no stage has a coefficient"),
    "first predicted": (stage(0, predicted=True), "the first stage is predicted from a stage before it"),
    "predicted or not": (card(lambda c: c["stages"][1].pop("predicted")), "stages.1.predicted: Field required"),
    "metric's dtype": (
        card(lambda c: c.update(metric_dtype="float64")),
        "metric_dtype: Input should be 'float16' or 'float32'",
    ),
    "no metric": (card(lambda c: c.update(metric_dtype=None)), "the metric fisher has blocks of dtype None"),
    "metric not said": (card(lambda c: c.pop("metric_dtype")), "metric_dtype: Field required"),
    "blocks of no metric": (
        card(lambda c: c["settings"].update(metric="frobenius")),
        "the metric frobenius has blocks of dtype float16",
    ),
    "no text": (card(lambda c: c.update(text=None)), "text, kept tokens or block are not what the settings say"),
    "stored features": (card(lambda c: c["text"].update(embedding=None)), "text.embedding: Input should be a valid integer"),
    "wide finder": (card(lambda c: c["text"].update(columns=41)), "tokens are searched for in 41 columns of 40"),
}
TENSOR_DAMAGES: dict[str, tuple[Damage, str]] = {
    "no file": (lambda folder: (folder / TENSORS).unlink(), "cannot be read (No such file"),
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-1]), "does not match card.json"),
    "lost": (tensors(lambda t: t.pop("stage.3.scale")), "tensor stage.3.scale is missing"),
    "fine lost": (tensors(lambda t: t.pop("stage.0.fine")), "tensor stage.0.fine is missing"),
    "coarse lost": (tensors(lambda t: t.pop("stage.7.coarse")), "tensor stage.7.coarse is missing"),
    "prediction lost": (tensors(lambda t: t.pop("prediction.3.spread")), "tensor prediction.3.spread is missing"),
    "prediction added": (stage(3, predicted=False), "tensor prediction.3.codes is not of this codec"),
    "prediction said": (stage(4, predicted=True), "tensor prediction.4.codes is missing"),
    "metric lost": (tensors(lambda t: t.pop("inverse_root.2")), "tensor inverse_root.2 is missing"),
    "metric added": (
        card(lambda c: (c["settings"].update(metric="frobenius"), c.update(metric_dtype=None))),
        "tensor inverse_root.0 is not of this codec",
    ),
    "metric of 32 bits": (
        card(lambda c: c.update(metric_dtype="float32")),
        "tensor inverse_root.0 is torch.float16 [2, 4, 4], the card says torch.float32 [2, 4, 4]",
    ),
    "one block of 32 bits": (
        put("inverse_root.3", Tensor.float),
        "tensor inverse_root.3 is torch.float32 [2, 6, 6], the card",
    ),
    "unknown": (tensors(lambda t: t.update(x=torch.zeros(1))), "tensor x is not of this codec"),
    "unknown stage": (tensors(lambda t: t.update({"stage.8.fine": torch.zeros(1)})), "tensor stage.8.fine is not of this"),
    "dtype": (put("stage.1.fine", Tensor.float), "stage.1.fine is torch.float32 [1, 4], the card says torch.float16 [1, 4]"),
    "coarse's dtype": (
        put("stage.1.coarse", Tensor.short),
        "stage.1.coarse is torch.int16 [2, 4], the card says torch.int8",
    ),
    "codes' dtype": (put("prediction.2.codes", Tensor.half), "prediction.2.codes is torch.float16 [6, 4], the card says"),
    "codes' shape": (
        put("prediction.2.codes", lambda x: x.mT),
        "prediction.2.codes is torch.int8 [4, 6], the card says torch.int8 [6, 4]",
    ),
    "another number of rows of 16 bits": (
        stage(1, fine=2, coarse=1),
        "stage.1.fine is torch.float16 [1, 4], the card says torch.float16 [2, 4]",
    ),
    "scales": (put("stage.1.scale", lambda x: x[1:]), "stage.1.scale is torch.float32 [2], the card says torch.float32 [3]"),
    "scales of weights": (put("prediction.2.scale", lambda x: x[1:]), "prediction.2.scale is torch.float32 [5], the card"),
    "spread": (put("prediction.2.spread", lambda x: x[1:]), "prediction.2.spread is torch.float32 [3], the card"),
    "text of all columns": (put("text.rows", lambda x: x.repeat(1, 2)), "text.rows is torch.float16 [2, 8], the card says"),
    "tables' dtype": (put("tables.shifts", Tensor.long), "tensor tables.shifts is torch.int64"),
    "metric's shape": (put("inverse_root.0", lambda x: x[:1]), "tensor inverse_root.0 is torch.float16 [1, 4, 4], the card"),
    "mix's shape": (put("text.mix", lambda x: x[:3]), "tensor text.mix is torch.float16 [3, 2], the card says"),
    "few coefficients": (put("quantiser.rest", lambda x: x[1:]), "tensor quantiser.rest is torch.float32 [20], the"),
    "no rank": (put("tables.table_of", lambda x: x[1:]), "tensor tables.table_of is torch.int32 [21], the card says"),
    "windows": (put("calibration.windows", lambda x: x[1:]), "tensor calibration.windows is torch.int64 [2], the card says"),
    "NaN": (at("text.rows", (0, 0), torch.nan), "tensor text.rows holds NaN or infinite values"),
    "infinite": (at("stage.4.scale", 1, torch.inf), "tensor stage.4.scale holds NaN or infinite values"),
    "infinite spread": (at("prediction.5.spread", 1, torch.inf), "tensor prediction.5.spread holds NaN or infinite values"),
    "NaN in the metric": (at("inverse_root.1", (0, 0, 0), torch.nan), "tensor inverse_root.1 holds NaN or infinite values"),
    "dead zone": (at("quantiser.dead_zone", 0, 0.4), "tensor quantiser.dead_zone is not within 0.5 and 1.2"),
    "offset": (at("quantiser.offset", 2, 0.5), "tensor quantiser.offset is not within -0.2 and 0.4"),
    "centroid": (at("quantiser.first", 2, 1.5), "tensor quantiser.first is not within -1.0 and 1.0"),
    "no such table": (at("tables.table_of", 2, 99), "entropy tables: a coefficient names a table that does not exist"),
    "negative table": (at("tables.table_of", 2, -1), "entropy tables: a coefficient names a table that does not exist"),
    "half": (at("tables.halves", 0, 128), "entropy tables: a table's width is out of range"),
    "shift": (at("tables.shifts", 0, -1), "entropy tables: a table's width is out of range"),
    "slots": (at("tables.starts", (1, 1), 0), "entropy tables: a table does not fill its slots"),
    "slots that come round": (
        tensors(lambda t: (t["tables.halves"].__setitem__(0, 1), wrapped(t["tables.starts"]))),
        "entropy tables: a table does not fill its slots",
    ),
    "before the first": (at("text.first", 0, -1), "tensor text.first is -1, not within 0 and 32"),
    "token twice": (at("text.order", 0, -1), "tensor text.order does not name each of 11 tokens once"),
    "shift lost": (tensors(lambda t: t.pop("text.shift")), "tensor text.shift is missing"),
    "wide embedding": (card(lambda c: c["text"].update(embedding=6)), "tensor text.projection is torch.float16 [5, 3], the"),
    "beyond the last": (at("text.first", 0, 33), "tensor text.first is 33, not within 0 and 32"),
}
DAMAGES = {(CARD, n): d for n, d in CARD_DAMAGES.items()} | {(TENSORS, n): d for n, d in TENSOR_DAMAGES.items()}


@pytest.mark.parametrize(("at_fault", "damage"), DAMAGES.items(), ids=[" ".join(key) for key in DAMAGES])
def test_a_damaged_codec_is_refused_naming_the_file_and_what_is_wrong(
    at_fault: tuple[str, str], damage: tuple[Damage, str], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "codec", planted("head"))
    change, says = damage
    change(folder)
    assert_refused(folder, at_fault[0], says)


def test_a_number_of_any_tensor_that_is_another_is_refused(tmp_path: Path) -> None:
    """Even where the card was made to agree with the file: the codec names itself."""
    folder = saved(tmp_path / "codec", planted("head"))
    stored = load_file(folder / TENSORS)
    names = [n for n, x in stored.items() if (x.is_floating_point() or x.dtype == torch.int8) and x.numel()]
    assert len(names) > 50 and sum(stored[n].dtype == torch.int8 for n in names) == 7 + 6
    for name in names:
        saved(folder, planted("head"))
        other = (lambda x: x.sub_(x.sign() or 1)) if stored[name].dtype == torch.int8 else (lambda x: x.mul_(0.99))
        tensors(lambda t, name=name, other=other: other(t[name].view(-1)[-1]))(folder)
        with pytest.raises(CodecError, match="describes codec "):
            load_codec(folder)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    good = planted("groups")
    t, q = good.transform, good.quantizer
    first, second = t.stages

    def with_stages(*stages: Stage) -> tuple[EigenCodec, EigenCardSettings]:
        return replace(good, transform=replace(t, stages=stages)), about(good)

    bad: dict[str, tuple[EigenCodec, EigenCardSettings]] = {
        "lanes: Input should be less": (replace(good, lanes=64), about(good)),
        "step: Input should be a finite": (replace(good, step=np.inf), about(good)),
        "the metric fisher has blocks of dtype None": (replace(good, transform=replace(t, inverse_roots=())), about(good)),
        "the metric frobenius has blocks of dtype float16": (good, about(good, metric="frobenius")),
        "tensor inverse_root.1 is torch.float32": (
            replace(
                good, transform=replace(t, inverse_roots=(t.inverse_roots[0], *(b.float() for b in t.inverse_roots[1:])))
            ),
            about(good),
        ),
        "the stages do not cover columns 0 to 40": with_stages(first),
        "the first stage is predicted": with_stages(replace(first, prediction=second.prediction), second),
        "a stage of 20 columns has 21 coefficients": with_stages(first, Stage.of(20, torch.randn(21, 20))),
        "tensor stage.1.fine is torch.float32": with_stages(first, replace(second, fine=second.fine.float())),
        "tensor stage.1.scale is torch.float32 .2.": with_stages(first, replace(second, scale=second.scale[1:])),
        "tensor prediction.1.spread holds NaN": with_stages(
            first, replace(second, prediction=replace(second.prediction, spread=torch.full((20,), torch.nan)))
        ),
        "are not what the settings say": (good, about(good, sinks=5)),
        "tensor mean holds NaN": (replace(good, transform=replace(t, mean=t.mean * np.nan)), about(good)),
        "dead_zone is not within": (replace(good, quantizer=replace(q, dead_zone=q.dead_zone * 9)), about(good)),
        "describes codec ": (replace(good, dtype=torch.float16), about(good)),  # the origin says float32
    }
    for says, (codec, settings_of) in bad.items():
        with pytest.raises(CodecError, match=f"planted – ünïcode: cannot be saved: .*{says}"):
            save_codec(tmp_path / "codec", codec, settings_of, ORIGIN, WINDOWS, EXPECTED)
    with pytest.raises(CodecError, match="cannot be saved: expected: Field required"):
        save_codec(tmp_path / "codec", good, about(good), ORIGIN, WINDOWS)
    assert not list(tmp_path.iterdir())
