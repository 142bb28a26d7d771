"""The rotation of the keys is detected in every dtype of a model."""

import pytest
import torch

from eigencache.models.capture import Capture
from eigencache.models.load import load
from eigencache.models.rope_detection import rotations_of
from eigencache.spectral.rope import unrotate

pytestmark = pytest.mark.slow

TOKENS = 1500


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ref-qwen2", "ref-deepseek"])
def test_late_keys_of_a_narrow_model_are_unrotated_to_their_rounding(name: str, dtype: str) -> None:
    loaded = load(name, device="cpu", dtype=dtype)
    rotations = rotations_of(loaded)
    ids = torch.randint(1, loaded.embedded_ids, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with Capture(loaded.model, loaded.geometry) as capture:
        for layer in capture.run(ids):
            kind = "key_rope" if loaded.geometry.mla else "keys"
            before, after = (layer.tensors[f"{kind}_{frame}_rope"].float() for frame in ("pre", "post"))
            rotation = rotations[layer.layer_idx]
            undone = unrotate(after, rotation.angles(torch.arange(TOKENS)), rotation.pairing)
            error = (undone - before)[..., -100:, :].abs().max() / before.abs().max()
            assert error < 4 * torch.finfo(getattr(torch, dtype)).eps
