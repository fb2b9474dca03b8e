"""The angles of rotary position embedding, and the scalings that stretch them past the trained
context.
"""

from __future__ import annotations

import math

import torch

from nano_vllm.config import ModelConfig, Rope, RopeScaling


def cos_sin_cache(
    config: ModelConfig, rope: Rope, max_position: int, device: torch.device
) -> torch.Tensor:
    """Cosines and sines of every position, in float32 as transformers computes them.

    Args:
        config: tells the rotated part of a head and the trained context.
        rope: base frequency and scaling.
        max_position: positions of the table, those of the longest sequence.
        device: where the table goes.

    Returns:
        [max_position, rotary_dim]; rotary_dim / 2 cosines, then as many sines.
    """
    rotary_dim = config.rotary_dim or config.head_dim
    scaling = rope.scaling
    positions = torch.arange(max_position, dtype=torch.float32)
    inv_freq = _inverse_frequencies(rope.theta, rotary_dim)
    attention_factor = 1.0
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "frequency_factors":
        inv_freq = inv_freq / torch.tensor(scaling.frequency_factors, dtype=torch.float32)
    elif scaling.kind == "dynamic":
        original = scaling.original_max_position or config.max_position
        inv_freq = _dynamic_frequencies(rope.theta, scaling, original, positions, rotary_dim)
    elif scaling.kind == "llama3":
        original = scaling.original_max_position or config.max_position
        inv_freq = _llama3_frequencies(inv_freq, scaling, original)
    elif scaling.kind == "yarn":
        original = scaling.original_max_position or config.max_position
        inv_freq, attention_factor = _yarn_frequencies(rope.theta, scaling, original, rotary_dim)
    elif scaling.kind == "longrope":
        original = scaling.original_max_position or config.max_position
        inv_freq, attention_factor = _longrope_frequencies(
            inv_freq, scaling, original, max_position
        )
    else:
        raise ValueError(
            f"rope scaling {scaling.kind!r} is not supported; "
            "supported: linear, dynamic, yarn, longrope, llama3"
        )
    angles = positions[:, None] * inv_freq
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor
    return cache.to(device)


def _inverse_frequencies(theta: float | torch.Tensor, rotary_dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def _dynamic_frequencies(
    theta: float, scaling: RopeScaling, original: int, positions: torch.Tensor, rotary_dim: int
) -> torch.Tensor:
    """NTK-aware scaling whose base grows with the length, for each position.

    Position p takes the base of a sequence of p + 1 tokens: what token-by-token decoding past the
    trained context gives, and the one choice that does not depend on how a prompt was cut into
    chunks.
    """
    lengths = torch.clamp(positions + 1, min=original)
    ratio = scaling.factor * lengths / original - (scaling.factor - 1)
    thetas = theta * ratio ** (rotary_dim / (rotary_dim - 2))
    return _inverse_frequencies(thetas[:, None], rotary_dim)


def _llama3_frequencies(
    inv_freq: torch.Tensor, scaling: RopeScaling, original: int
) -> torch.Tensor:
    """Long wavelengths stretched by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / scaling.factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def _longrope_frequencies(
    inv_freq: torch.Tensor, scaling: RopeScaling, original: int, max_position: int
) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv 2402.13753): searched divisors, one set for the trained context and one for
    longer ones, and cos/sin are scaled.

    transformers chooses the set by each sequence's length, and computes its keys anew when it
    outgrows the trained context. Here, as in llama.cpp, the longest sequence that may come decides
    for all, so that what a key is does not depend on when it was computed.
    """
    factors = scaling.long_factors if max_position > original else scaling.short_factors
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        stretched = scaling.factor > 1
        attention_factor = (
            math.sqrt(1 + math.log(scaling.factor) / math.log(original)) if stretched else 1.0
        )
    return inv_freq / torch.tensor(factors, dtype=torch.float32), attention_factor


def _yarn_frequencies(
    theta: float, scaling: RopeScaling, original: int, rotary_dim: int
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies ramp from interpolated to extrapolated, and cos/sin are
    scaled.
    """
    factor = scaling.factor

    def mscale(scale: float, by: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * by * math.log(scale) + 1.0

    if scaling.attention_factor is not None:
        attention_factor = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        attention_factor = mscale(factor, scaling.mscale) / mscale(factor, scaling.mscale_all_dim)
    else:
        attention_factor = mscale(factor)

    def dimension_turning(rotations: float) -> float:
        return (rotary_dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolation = _inverse_frequencies(theta, rotary_dim)
    inv_freq = extrapolation / factor * ramp + extrapolation * (1 - ramp)
    return inv_freq, attention_factor
