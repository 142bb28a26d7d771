"""Rotary position embedding as an exactly invertible map.

Pairs of dimensions are rotated by n·θ_i (Su et al. 2021). Implementations differ in the dimensions that form a pair:
`half` pairs i with i + r/2; `interleaved` pairs 2i with 2i + 1; `split` reads pairs 2i, 2i + 1 and writes them as
i, i + r/2. Dimensions beyond the rotary width are unchanged. Scaled variants (YaRN, LongRoPE) multiply cos and sin by a
common factor, which the inverse divides out.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved", "split"]
PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)
_STEPS = 16  # steps per octave to which frequencies and scales are rounded for the hash


@dataclass(frozen=True)
class Angles:
    """cos and sin of the angles of all pairs, each [batch or 1, 1, seq, r / 2], including the scale of the model."""

    cos: Tensor
    sin: Tensor

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions, r."""
        return 2 * self.cos.shape[-1]

    def to(self, device: torch.device) -> "Angles":
        """Return a copy on another device."""
        return Angles(self.cos.to(device), self.sin.to(device))


def angles_from(tables: Tensor | tuple[Tensor, Tensor]) -> Angles:
    """Return the angles from the tables that a model passes to its attention layers.

    Args:
        tables: A complex table [batch, seq, r/2], or cos and sin, each [batch, seq, r/2] or [batch, seq, r]. A table of r
            columns repeats each entry, in two halves or in neighboring columns.
    """
    if isinstance(tables, Tensor):
        return Angles(tables.real.unsqueeze(1), tables.imag.unsqueeze(1))
    cos, sin = tables
    half = cos.shape[-1] // 2
    if half and torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:]):
        cos, sin = cos[..., :half], sin[..., :half]
    elif half and torch.equal(cos[..., ::2], cos[..., 1::2]) and torch.equal(sin[..., ::2], sin[..., 1::2]):
        cos, sin = cos[..., ::2], sin[..., ::2]
    return Angles(cos.unsqueeze(1), sin.unsqueeze(1))


def pairs(x: Tensor, neighbors: bool) -> tuple[Tensor, Tensor]:
    """Return the first and the second members of all pairs, each [..., r / 2].

    Args:
        x: Vectors [..., r].
        neighbors: Pair 2i with 2i + 1 if true, i with i + r/2 otherwise.
    """
    return (x[..., ::2], x[..., 1::2]) if neighbors else x.chunk(2, dim=-1)  # type: ignore[return-value]


def joined(first: Tensor, second: Tensor, neighbors: bool) -> Tensor:
    """Return vectors [..., r] from the members of their pairs, the inverse of `pairs`."""
    return torch.stack((first, second), -1).flatten(-2) if neighbors else torch.cat((first, second), -1)


def rotate(x: Tensor, angles: Angles, pairing: Pairing) -> Tensor:
    """Return R_n x, as a model rotates its keys and queries.

    Args:
        x: Vectors [batch, heads, seq, d].
        angles: Angles of their positions; the first `angles.rotary_dim` dimensions are rotated.
        pairing: Dimensions that form a pair.
    """
    head, tail = x[..., : angles.rotary_dim], x[..., angles.rotary_dim :]
    first, second = pairs(head, pairing != "half")
    turned = first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin
    return torch.cat((joined(*turned, pairing == "interleaved"), tail), -1).to(x.dtype)


def unrotate(x: Tensor, angles: Angles, pairing: Pairing) -> Tensor:
    """Return x with its rotation undone, the inverse of `rotate`; arguments as there.

    Computed in float32 at least, and divided by cos² + sin², which is not exactly 1 for a 16-bit table.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    head, tail = x[..., : angles.rotary_dim], x[..., angles.rotary_dim :]
    first, second = pairs(head, pairing == "interleaved")
    cos, sin = angles.cos.to(dtype), angles.sin.to(dtype)
    scale = cos.square() + sin.square()
    turned = (first * cos + second * sin) / scale, (second * cos - first * sin) / scale
    return torch.cat((joined(*turned, pairing != "half"), tail), -1).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotation of one layer for any position n: pairs are rotated by n·θ_i and multiplied by `scale`."""

    frequencies: Tensor  # θ [pairs], radians per position, float64
    scale: float
    pairing: Pairing

    def angles(self, positions: Tensor) -> Angles:
        """Return cos and sin at `positions` [seq], each [1, 1, seq, pairs] in float32."""
        turned = positions.to(self.frequencies.device, torch.float64)[:, None] * self.frequencies
        return Angles(*((self.scale * part).float()[None, None] for part in (turned.cos(), turned.sin())))


def rotation_from(angles: Angles, pairing: Pairing) -> Rotation | None:
    """Return the rotation that produced a table of angles.

    Frequencies are fitted to all positions, so that the rounding of a 16-bit table averages out.

    Args:
        angles: Table of the positions 0, 1, … [1, 1, seq, pairs].
        pairing: Dimensions that form a pair.

    Returns:
        The rotation; None where the angles are not n·θ_i, for example if they depend on the length of the text, or where
        a pair rotates by more than π per position.
    """
    cos, sin = angles.cos[0, 0].double().cpu(), angles.sin[0, 0].double().cpu()
    if len(cos) < 2 or not (scale := float(torch.hypot(cos, sin).mean())):
        return None
    rotation = Rotation(_frequencies(torch.atan2(sin, cos)), scale, pairing)
    again = rotation.angles(torch.arange(len(cos)))
    error = max(float((again.cos[0, 0] - cos).abs().max()), float((again.sin[0, 0] - sin).abs().max()))
    return rotation if error <= 1e-2 * scale else None


def _frequencies(turned: Tensor) -> Tensor:
    """Return the least-squares fit of θ [pairs] to angles n·θ modulo 2π [seq, pairs], n = 0, 1, ….

    The number of positions is doubled step by step. The fit to the first half determines the number of full turns at
    each position of the second half.
    """
    frequencies, last = turned[1], len(turned) - 1
    known = 1
    while known < last:
        known = min(2 * known, last)
        n = torch.arange(1, known + 1, dtype=torch.float64)[:, None]
        rounds = ((n * frequencies - turned[1 : known + 1]) / (2 * math.pi)).round()
        frequencies = (n * (turned[1 : known + 1] + 2 * math.pi * rounds)).sum(0) / n.square().sum()
    return frequencies


def rope_sha256(rotations: Mapping[int, Rotation]) -> str:
    """Return a SHA-256 of the rotations of all layers that ignores rounding.

    It covers the layer indices, pairings, scales and frequencies. Scales and frequencies are rounded to steps of 1/16
    octave (4 %). Machines and library versions agree to about 1e-6, so about one value in 40,000 is close enough to the
    boundary of a step to give different hashes for the same rotation.

    Args:
        rotations: Rotation by layer index; layers without rotation are absent.
    """
    digest = hashlib.sha256()
    for layer_idx, rotation in sorted(rotations.items()):
        steps = [_step(value) for value in (rotation.scale, *rotation.frequencies.tolist())]
        digest.update(f"{layer_idx} {rotation.pairing} {' '.join(steps)}\n".encode())
    return digest.hexdigest()


def _step(value: float) -> str:
    """Return sign and step of a value; 0 for a frequency too low to rotate noticeably over any length of text."""
    if abs(value) < 1e-12:
        return "0"
    return f"{'-' if value < 0 else '+'}{round(_STEPS * math.log2(abs(value)))}"
