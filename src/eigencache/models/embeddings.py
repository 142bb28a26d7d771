"""A model's embeddings of tokens, asked of it whenever they are needed: an adapter may sit on them."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eigencache.models.devices import device_of


def embed_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What gives embeddings [n, d] float32 of token ids [n], without gradients, where the ids are."""

    def embed(ids: Tensor) -> Tensor:
        module = model.get_input_embeddings()
        with torch.no_grad():
            return module(ids.to(device_of(module))).float().to(ids.device)

    return embed
