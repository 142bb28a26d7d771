"""The hash of an `eigen` codec, by which containers name it: it changes with every number, size and name that matters."""

from dataclasses import fields, replace

import torch

from eigen_chain import TableFeatures
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.transform import Prediction, Stage
from staged_codecs import COLUMNS, LAYOUT, ROTATION, WIDTH, base, predictor, transform


def changed_stages() -> dict[str, tuple[Stage, Stage]]:
    """Two stages of which anything at all is another."""
    first, second = transform().stages
    assert second.prediction is not None
    bytewise = torch.cat([first.fine.view(torch.int8).view(-1, COLUMNS), first.coarse])
    changed = {
        "fine": (replace(first, fine=-first.fine), second),
        "coarse": (first, replace(second, coarse=-second.coarse)),
        "scale": (first, replace(second, scale=2 * second.scale)),
        "columns": (first, replace(second, start=COLUMNS + 1, stop=WIDTH + 1)),
        "end": (first, replace(second, stop=WIDTH + 1)),
        "border": (replace(first, stop=COLUMNS - 1), replace(second, start=COLUMNS - 1)),
        "rows of 8 bits whose bytes are those of 16": (replace(first, fine=first.fine[:0], coarse=bytewise), second),
        "no prediction": (first, replace(second, prediction=None)),
    }
    for field in fields(Prediction):
        more = {field.name: getattr(second.prediction, field.name) + 1}
        changed[f"prediction's {field.name}"] = first, replace(second, prediction=replace(second.prediction, **more))
    return changed


def changed_codecs() -> dict[str, EigenCodec]:
    one = base(text=True)
    t, q, tables = one.transform, one.quantizer, one.tables
    roots = t.inverse_roots
    changes = {
        "step": replace(one, step=0.31),
        "lanes": replace(one, lanes=8),
        "block": replace(one, block=17),
        "dtype": replace(one, dtype=torch.float16),
        "sinks": replace(one, kept=SinksAndWindow(5, 6, 8)),
        "window": replace(one, kept=SinksAndWindow(4, 7, 8)),
        "bits": replace(one, kept=SinksAndWindow(4, 6, 16)),
        "no text": replace(one, text=None),
        "parts": replace(one, layout=replace(LAYOUT, parts=LAYOUT.parts[::-1])),
        "mean": replace(one, transform=replace(t, mean=t.mean + 1)),
        "a block": replace(one, transform=replace(t, inverse_roots=(2 * roots[0], *roots[1:]))),
        "the last block": replace(one, transform=replace(t, inverse_roots=(*roots[:-1], 2 * roots[-1]))),
        "blocks of 32 bits": replace(one, transform=replace(t, inverse_roots=tuple(b.float() for b in roots))),
        "no blocks": replace(one, transform=replace(t, inverse_roots=())),
    }
    for name, stages in changed_stages().items():
        changes[name] = replace(one, transform=replace(t, stages=stages))
    for field in fields(q):
        changes[field.name] = replace(one, quantizer=replace(q, **{field.name: getattr(q, field.name) + 0.001}))
    for field in fields(tables):
        changes[field.name] = replace(one, tables=replace(tables, **{field.name: getattr(tables, field.name) + 1}))
    other = TableFeatures(next(iter(predictor().features.tensors())) + 1)
    changes["text features"] = replace(one, text=replace(predictor(), features=other))
    for name in ("mix", "rows", "first", "finder", "places"):
        changes[f"text {name}"] = replace(one, text=replace(predictor(), **{name: getattr(predictor(), name) + 1}))
    for name, rotation in {
        "frequencies": replace(ROTATION, frequencies=ROTATION.frequencies * 1.0000001),
        "rotation's scale": replace(ROTATION, scale=1.1),
        "pairing": replace(ROTATION, pairing="interleaved"),
    }.items():
        changes[name] = replace(one, layout=replace(LAYOUT, rotations=LAYOUT.rotations | {1: (0, rotation)}))
    changes["rotated slot"] = replace(one, layout=replace(LAYOUT, rotations=LAYOUT.rotations | {1: (1, ROTATION)}))
    changes["no rotation"] = replace(one, layout=replace(LAYOUT, rotations={0: (0, ROTATION)}))
    return changes


def test_the_hash_is_of_all_that_decides_what_bytes_mean() -> None:
    hashes = {name: one.sha256 for name, one in changed_codecs().items()} | {"unchanged": base(text=True).sha256}
    assert len(set(hashes.values())) == len(hashes)
    assert replace(base(text=True), name="another").sha256 == hashes["unchanged"]
    assert replace(base(text=True), tables=replace(base(text=True).tables)).sha256 == hashes["unchanged"]
