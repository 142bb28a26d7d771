"""The device on which a module computes, including modules whose weights accelerate keeps on disk (device `meta`)."""

from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module expects its input; the CPU for a module without tensors."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    tensors = (t for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta")
    return next((t.device for t in tensors), torch.device("cpu"))
