"""Token embeddings of a model, computed by its current embedding module, which an adapter may have replaced."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eigencache.models.devices import device_of


def embed_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids [n] to embeddings [n, d] in float32, on the device of the ids, without gradients."""

    def embed(ids: Tensor) -> Tensor:
        module = model.get_input_embeddings()
        with torch.no_grad():
            return module(ids.to(device_of(module))).float().to(ids.device)

    return embed
