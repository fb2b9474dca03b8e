"""The angles of rotary position embedding, and the scalings that stretch them past the trained
context.
"""

from __future__ import annotations

import math

import torch

from nano_vllm.config import ModelConfig, RopeScaling


def cos_sin_cache(config: ModelConfig, max_position: int, device: torch.device) -> torch.Tensor:
    """Cosines and sines of every position, in float32 as transformers computes them.

    Returns:
        [max_position, rotary_dim]; rotary_dim / 2 cosines, then as many sines.
    """
    rotary_dim = config.rotary_dim or config.head_dim
    scaling = config.rope_scaling
    positions = torch.arange(max_position, dtype=torch.float32)
    attention_factor = 1.0
    if scaling is None:
        angles = torch.outer(positions, _inverse_frequencies(config.rope_theta, rotary_dim))
    elif scaling.kind == "linear":
        inv_freq = _inverse_frequencies(config.rope_theta, rotary_dim) / scaling.factor
        angles = torch.outer(positions, inv_freq)
    elif scaling.kind == "frequency_factors":
        factors = torch.tensor(scaling.frequency_factors, dtype=torch.float32)
        inv_freq = _inverse_frequencies(config.rope_theta, rotary_dim) / factors
        angles = torch.outer(positions, inv_freq)
    elif scaling.kind == "dynamic":
        angles = _dynamic_angles(config, scaling, positions, rotary_dim)
    elif scaling.kind == "llama3":
        angles = torch.outer(positions, _llama3_frequencies(config, scaling, rotary_dim))
    elif scaling.kind == "yarn":
        inv_freq, attention_factor = _yarn_frequencies(config, scaling, rotary_dim)
        angles = torch.outer(positions, inv_freq)
    else:
        raise ValueError(
            f"rope scaling {scaling.kind!r} is not supported; "
            "supported: linear, dynamic, yarn, llama3"
        )
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor
    return cache.to(device)


def _inverse_frequencies(theta: float | torch.Tensor, rotary_dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def _dynamic_angles(
    config: ModelConfig, scaling: RopeScaling, positions: torch.Tensor, rotary_dim: int
) -> torch.Tensor:
    """NTK-aware scaling whose base grows with the length.

    Position p takes the base of a sequence of p + 1 tokens: what token-by-token decoding past the
    trained context gives, and the one choice that does not depend on how a prompt was cut into
    chunks.
    """
    original = scaling.original_max_position or config.max_position
    lengths = torch.clamp(positions + 1, min=original)
    ratio = scaling.factor * lengths / original - (scaling.factor - 1)
    theta = config.rope_theta * ratio ** (rotary_dim / (rotary_dim - 2))
    return positions[:, None] * _inverse_frequencies(theta[:, None], rotary_dim)


def _llama3_frequencies(config: ModelConfig, scaling: RopeScaling, rotary_dim: int) -> torch.Tensor:
    """Long wavelengths stretched by the factor, short ones kept, those between interpolated."""
    original = scaling.original_max_position or config.max_position
    inv_freq = _inverse_frequencies(config.rope_theta, rotary_dim)
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / scaling.factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def _yarn_frequencies(
    config: ModelConfig, scaling: RopeScaling, rotary_dim: int
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies ramp from interpolated to extrapolated, and cos/sin are
    scaled.
    """
    original = scaling.original_max_position or config.max_position
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
        return (rotary_dim * math.log(original / (rotations * 2 * math.pi))) / (
            2 * math.log(config.rope_theta)
        )

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolation = _inverse_frequencies(config.rope_theta, rotary_dim)
    inv_freq = extrapolation / factor * ramp + extrapolation * (1 - ramp)
    return inv_freq, attention_factor
