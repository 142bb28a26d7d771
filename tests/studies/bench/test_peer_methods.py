"""Methods that are packages of others make their caches through the bench's protocol, and are refused where they cannot."""

import pytest
import torch

from eigencache.codec.base import CacheMaker
from eigencache.evaluate.prefix import read_prefix
from eigencache.models.caches import hf_quantized, kvpress
from eigencache.studies.bench.methods import METHODS, Codecs
from stub_codecs import bundled

QUANTIZED, PRESSES = ("hf-quanto", "hf-hqq", "hf-hqq-axis-1"), ("knorm", "snapkv", "expected-attention")


def codecs(method: str) -> Codecs:
    return METHODS[method].codecs(None)  # type: ignore[arg-type] # nothing is fitted


@pytest.mark.parametrize("method", QUANTIZED + PRESSES)
@pytest.mark.parametrize("model", ["ref-llama", "ref-qwen2", "ref-gpt2", "ref-deepseek"])
@torch.no_grad()
def test_they_hold_a_prefix_in_fewer_bytes_at_every_further_point_or_say_why_not(model: str, method: str) -> None:
    loaded = bundled(model)
    if why := METHODS[method].refuses(loaded):
        if "not installed" in why:
            pytest.skip(why)
        assert method in PRESSES and model in ("ref-gpt2", "ref-deepseek") and why.startswith("kvpress works on")
        return
    ids = torch.randint(1, 500, (2, 97), generator=torch.Generator().manual_seed(0))
    prefix, sizes = read_prefix(loaded, ids[:, :96]), []
    whole = sum(2 * x.numel() for slots in prefix.stored.values() for x in slots)
    for point, made in codecs(method).items():
        assert isinstance(made, CacheMaker) and made.nbytes == 0
        tokens, nbytes = made.held(made.cache_of(prefix))
        assert tokens == 2 * 96
        if method in PRESSES:
            assert nbytes == whole * int(96 * (1 - float(point))) // 96
        else:
            assert nbytes == whole * (int(point) + 0.5) / 16
        assert prefix.logits(ids[:, 96:], made).isfinite().all()
        sizes.append(nbytes)
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 1


def test_without_their_packages_they_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvpress, "find_spec", lambda _: None)
    monkeypatch.setattr(hf_quantized, "_AVAILABLE", {"quanto": lambda: False, "hqq": lambda: False})
    for method in QUANTIZED + PRESSES:
        assert str(METHODS[method].refuses(bundled("ref-llama"))).endswith("is not installed: install 'eigencache[peers]'")
        assert not METHODS[method].fitted and METHODS[method].about
