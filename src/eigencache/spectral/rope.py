"""Rotary position embedding as an exact, invertible map: rotation undone and redone returns the vector.

Pairs of a vector are rotated by n·θ_i (Su et al. 2021). Implementations differ in which numbers form a pair:
`half` pairs i with i + r/2; `interleaved` pairs 2i with 2i + 1; `split` reads pairs 2i, 2i + 1 and writes them as
i, i + r/2. Numbers beyond the rotary width pass unchanged. Scaled variants (YaRN, LongRoPE) multiply cos and sin
by a common factor, which the inverse divides out.
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
_STEPS = 16  # per octave, of frequencies and scales in a hash


@dataclass(frozen=True)
class Angles:
    """cos and sin of every pair's angle, [batch or 1, 1, seq, r / 2], already scaled where a model scales them."""

    cos: Tensor
    sin: Tensor

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a vector are rotated."""
        return 2 * self.cos.shape[-1]

    def to(self, device: torch.device) -> "Angles":
        """The same on another device."""
        return Angles(self.cos.to(device), self.sin.to(device))


def angles_from(tables: Tensor | tuple[Tensor, Tensor]) -> Angles:
    """Angles from what a model hands to its attention layers: a complex table, or cos and sin [batch, seq, r or r/2].

    A table that repeats itself, as two halves or in neighbors, has one entry per number and not per pair.
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
    """What turns together, the first of every pair and the second: neighbors, or the two halves."""
    return (x[..., ::2], x[..., 1::2]) if neighbors else x.chunk(2, dim=-1)  # type: ignore[return-value]


def joined(first: Tensor, second: Tensor, neighbors: bool) -> Tensor:
    """The inverse of `pairs`."""
    return torch.stack((first, second), -1).flatten(-2) if neighbors else torch.cat((first, second), -1)


def rotate(x: Tensor, angles: Angles, pairing: Pairing) -> Tensor:
    """R_n x for x [batch, heads, seq, d]: what a model does to its keys and queries."""
    head, tail = x[..., : angles.rotary_dim], x[..., angles.rotary_dim :]
    first, second = pairs(head, pairing != "half")
    turned = first * angles.cos - second * angles.sin, second * angles.cos + first * angles.sin
    return torch.cat((joined(*turned, pairing == "interleaved"), tail), -1).to(x.dtype)


def unrotate(x: Tensor, angles: Angles, pairing: Pairing) -> Tensor:
    """The inverse of `rotate`, in float32 at least: cos² + sin² of a 16-bit table is not 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    head, tail = x[..., : angles.rotary_dim], x[..., angles.rotary_dim :]
    first, second = pairs(head, pairing == "interleaved")
    cos, sin = angles.cos.to(dtype), angles.sin.to(dtype)
    scale = cos.square() + sin.square()
    turned = (first * cos + second * sin) / scale, (second * cos - first * sin) / scale
    return torch.cat((joined(*turned, pairing != "half"), tail), -1).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rotation:
    """One layer's rotation at any position n: pairs turned by n·θ_i and scaled; what a codec needs to undo and redo it."""

    frequencies: Tensor  # θ [pairs], radians per position, float64
    scale: float
    pairing: Pairing

    def angles(self, positions: Tensor) -> Angles:
        """cos and sin at `positions` [seq], float32: [1, 1, seq, pairs]."""
        turned = positions.to(self.frequencies.device, torch.float64)[:, None] * self.frequencies
        return Angles(*((self.scale * part).float()[None, None] for part in (turned.cos(), turned.sin())))


def rotation_from(angles: Angles, pairing: Pairing) -> Rotation | None:
    """The rotation behind a table of positions 0, 1, … [1, 1, seq, pairs]; None where the table is not n·θ_i.

    Frequencies are fitted to all positions, so that the rounding of a 16-bit table averages out. A rotation whose angles
    depend on the length of the text, or that turns by more than π per position, is None.
    """
    cos, sin = angles.cos[0, 0].double().cpu(), angles.sin[0, 0].double().cpu()
    if len(cos) < 2 or not (scale := float(torch.hypot(cos, sin).mean())):
        return None
    rotation = Rotation(_frequencies(torch.atan2(sin, cos)), scale, pairing)
    again = rotation.angles(torch.arange(len(cos)))
    error = max(float((again.cos[0, 0] - cos).abs().max()), float((again.sin[0, 0] - sin).abs().max()))
    return rotation if error <= 1e-2 * scale else None


def _frequencies(turned: Tensor) -> Tensor:
    """θ [pairs] that fits angles n·θ modulo 2π best, [seq, pairs] from n = 0; from twice as many positions at a time.

    What half as many positions say of θ tells how often a pair has turned round by now.
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
    """SHA-256 of the layers that rotate, their pairings, scales and frequencies: equal for rotations equal to rounding.

    Frequencies and scales enter in steps of 1/16 octave (4 %). Machines and library versions compute them equal to about
    1e-6, so that one in 40,000 falls on either side of a step's border: such a rotation passes for another one.
    """
    digest = hashlib.sha256()
    for layer_idx, rotation in sorted(rotations.items()):
        steps = [_step(value) for value in (rotation.scale, *rotation.frequencies.tolist())]
        digest.update(f"{layer_idx} {rotation.pairing} {' '.join(steps)}\n".encode())
    return digest.hexdigest()


def _step(value: float) -> str:
    """Sign and step of a number; what never turns over any length of text is 0."""
    if abs(value) < 1e-12:
        return "0"
    return f"{'-' if value < 0 else '+'}{round(_STEPS * math.log2(abs(value)))}"
