"""The rotary part of a config.json, in the forms transformers has written over the years."""

from __future__ import annotations

from nano_vllm.config import Rope, RopeScaling
from nano_vllm.config_fields import ConfigFields, is_finite

SCALING_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")


def parse_rope(
    fields: ConfigFields, max_position: int, head_dim: int, layer_type: str | None = None
) -> tuple[Rope, int]:
    """Base frequency and scaling of a model, and the rotated part of a head.

    Until transformers 4, `rope_theta` and `partial_rotary_factor` stand at the top level and
    `rope_scaling` holds the rest; since transformers 5, `rope_parameters` holds it all. The kind is
    called `rope_type`, once `type`.

    With a `layer_type`, `rope_parameters` may hold an object for each; in the older form,
    `rope_local_base_freq` is that of sliding_attention, and the rest is that of full_attention.
    """
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    theta_name = "rope_theta"
    parameters = fields.raw(name, {})
    if not isinstance(parameters, dict):
        raise fields.error(name, f"must be an object, got {parameters!r}")
    is_nested = any(isinstance(value, dict) for value in parameters.values())
    if is_nested and layer_type is None:
        raise fields.error(name, "differs between layers, which is not supported")
    if layer_type == "sliding_attention":
        theta_name = "rope_local_base_freq"
    if layer_type is not None and name == "rope_parameters" and is_nested:
        parameters = parameters.get(layer_type, {})
        if not isinstance(parameters, dict):
            raise fields.error(name, f"must hold an object for {layer_type}, got {parameters!r}")
    elif layer_type == "sliding_attention":
        parameters = {}
    rope = ConfigFields(parameters, f"{fields.source}: {name}")
    theta = rope.number("rope_theta", fields.number(theta_name, 10000.0))
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share > 1:
        raise fields.error("partial_rotary_factor", f"must be in (0, 1], got {share!r}")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "partial_rotary_factor",
            f"must leave an even part of heads of {head_dim}, got {share!r}: {rotary_dim}",
        )
    return Rope(theta, _scaling(rope, fields, max_position, rotary_dim)), rotary_dim


def _scaling(
    rope: ConfigFields, fields: ConfigFields, max_position: int, rotary_dim: int
) -> RopeScaling | None:
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind == "default":
        return None
    if "long_factor" in rope and kind in ("su", "yarn"):
        kind = "longrope"  # once called so in Phi-3
    if kind not in SCALING_KINDS:
        supported = ", ".join(("default", *SCALING_KINDS))
        raise ValueError(
            f"{rope.source}: rope type {kind!r} is not supported; supported: {supported}"
        )
    original = rope.integer("original_max_position_embeddings", max_position)
    original = fields.integer("original_max_position_embeddings", original)
    if kind == "longrope":
        return RopeScaling(
            kind,
            rope.number("factor", max_position / original),
            original,
            attention_factor=rope.number("attention_factor", None),
            short_factors=_factors(rope, "short_factor", rotary_dim // 2),
            long_factors=_factors(rope, "long_factor", rotary_dim // 2),
        )
    factor = rope.number("factor")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error(
                "high_freq_factor", f"must be above low_freq_factor {low!r}, got {high!r}"
            )
        return RopeScaling(kind, factor, original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return RopeScaling(
            kind,
            factor,
            original,
            attention_factor=rope.number("attention_factor", None),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.number("mscale", None, positive=False),
            mscale_all_dim=rope.number("mscale_all_dim", None, positive=False),
            truncate=rope.flag("truncate", True),
        )
    # Linear and dynamic scaling start from the length in the config itself.
    return RopeScaling(kind, factor, max_position)


def _factors(rope: ConfigFields, name: str, count: int) -> tuple[float, ...]:
    values = rope.raw(name)
    is_list = isinstance(values, list) and len(values) == count
    if not is_list or not all(is_finite(v) and v > 0 for v in values):
        raise rope.error(name, f"must be a list of {count} finite numbers above 0, got {values!r}")
    return tuple(map(float, values))
