"""The rotary part of a config.json, in the forms transformers has written over the years."""

from __future__ import annotations

from nano_vllm.config import RopeScaling
from nano_vllm.weights.config_fields import ConfigFields

SCALING_KINDS = ("linear", "dynamic", "yarn", "llama3")


def parse_rope(fields: ConfigFields, max_position: int) -> tuple[float, float, RopeScaling | None]:
    """(base frequency, rotated share of a head, scaling) of a model.

    Until transformers 4, `rope_theta` and `partial_rotary_factor` stand at the top level and
    `rope_scaling` holds the rest; since transformers 5, `rope_parameters` holds it all. The kind is
    called `rope_type`, once `type`.
    """
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    parameters = fields.raw(name, {})
    if not isinstance(parameters, dict):
        raise fields.error(name, f"must be an object, got {parameters!r}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise fields.error(name, "differs between layers, which is not supported")
    rope = ConfigFields(parameters, f"{fields.source}: {name}")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share > 1:
        raise fields.error("partial_rotary_factor", f"must be in (0, 1], got {share!r}")
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind == "default":
        return theta, share, None
    if kind not in SCALING_KINDS:
        supported = ", ".join(("default", *SCALING_KINDS))
        raise ValueError(
            f"{rope.source}: rope type {kind!r} is not supported; supported: {supported}"
        )
    original = rope.integer("original_max_position_embeddings", max_position)
    original = fields.integer("original_max_position_embeddings", original)
    factor = rope.number("factor")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error(
                "high_freq_factor", f"must be above low_freq_factor {low!r}, got {high!r}"
            )
        return (
            theta,
            share,
            RopeScaling(kind, factor, original, low_freq_factor=low, high_freq_factor=high),
        )
    if kind == "yarn":
        return (
            theta,
            share,
            RopeScaling(
                kind,
                factor,
                original,
                attention_factor=rope.number("attention_factor", None),
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                mscale=rope.number("mscale", None, positive=False),
                mscale_all_dim=rope.number("mscale_all_dim", None, positive=False),
                truncate=rope.flag("truncate", True),
            ),
        )
    # Linear and dynamic scaling start from the length in the config itself.
    return theta, share, RopeScaling(kind, factor, max_position)
