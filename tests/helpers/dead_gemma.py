"""A tiny Gemma 3 with dead dimensions, as the real one has them: weights of its key norm that are exactly zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from tiny_models import GQA4, built, tiny

PAIR, SINGLE = (2, 10), 5  # of 16: a whole rotary pair, and a dimension whose partner 13 varies
DEAD_KEYS = (PAIR[0], SINGLE, PAIR[1])
CONSTANTS = {3: 0.7, 20: 0.0}  # dimension of the values of a layer (two heads of 16) → what it always is


def dead_gemma(**settings: Any) -> PreTrainedModel:
    """The tiny `gemma3_text`, or one of other settings. Its norm multiplies by 1 + weight, so a weight of −1 is zero."""
    if settings:
        model = built("gemma3_text", "AutoModelForCausalLM", GQA4 | {"attention_bias": True} | settings)
    else:
        model = copy.deepcopy(tiny("gemma3_text"))
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_norm.weight[list(DEAD_KEYS)] = -1
            for row, value in CONSTANTS.items():
                attention.v_proj.weight[row] = 0
                attention.v_proj.bias[row] = value
    return model
