"""Every command has a function of the same name, and a live codec can be fitted, saved and loaded alone."""

from pathlib import Path

import pytest
import torch

from eigencache import api
from eigencache.api import CacheCodec, CompressedCache, fit
from eigencache.cli.app import app
from eigencache.codec.saved.folder import load_live
from eigencache.errors import BudgetError, CodecError
from eigencache.fitting.fit import LiveGoal
from stub_codecs import bundled

FEW = {"text": "stdlib", "tokens": 8192, "max_length": 256}


def test_every_command_has_a_function_of_its_name() -> None:
    names = [command.name for command in app.registered_commands]
    assert names and all(callable(getattr(api, str(name))) for name in names)
    assert set(map(str, names)) <= set(api.__all__)


def test_a_live_codec_is_fitted_saved_and_loaded_without_the_stored_one(tmp_path: Path) -> None:
    loaded = bundled("ref-llama")
    codec = fit("ref-llama", **FEW, stored=False, live=LiveGoal(bits=4.0))  # type: ignore[arg-type]
    assert codec.codec is None and codec.live is not None
    codec.save(tmp_path / "live")
    again = CacheCodec.load(tmp_path / "live", "ref-llama")
    assert again.codec is None and again.live is not None
    assert load_live(tmp_path / "live").codec.name == codec.live.name
    ids = torch.arange(200)[None] % 500
    with torch.no_grad():
        first, second = (
            one.loaded.model(ids, past_key_values=CompressedCache(one.loaded.model, one.live), use_cache=True).logits
            for one in (codec, again)
        )
    assert torch.equal(first, second) and loaded.name == "ref-llama"
    with pytest.raises(CodecError, match="only the live codec was fitted"):
        again.decode(b"")


def test_a_fit_of_nothing_and_goals_of_what_is_left_out_are_refused() -> None:
    with pytest.raises(BudgetError, match="no codec is left to fit"):
        fit("ref-llama", stored=False)
    with pytest.raises(BudgetError, match="`bits` is a goal of the stored codec"):
        fit("ref-llama", stored=False, live=True, bits=1.0)
