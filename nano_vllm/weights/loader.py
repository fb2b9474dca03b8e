"""Checkpoint -> model parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nano_vllm.config import ModelConfig
from nano_vllm.distributed.sharding import Sharding
from nano_vllm.layers.embedding import Embedding
from nano_vllm.layers.linear import Linear
from nano_vllm.quantization.packed_weight import pack
from nano_vllm.weights.checkpoint import WHOLE, Checkpoint, Region, open_checkpoint
from nano_vllm.weights.dummy import fill_dummy_weights
from nano_vllm.weights.model_config import load_model_config

__all__ = ["load_model_config", "load_weights"]

_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of tensors that some checkpoints hold but that follow from the configuration."""
_CACHE_SCALE = re.compile(r"(.+)\.(?:attn|k_proj|v_proj)\.([kv]_scale)")
"""Where some quantizers put a scale that others, and our buffers, have beside the projections."""
_MAX_NAMED = 4
"""Names listed in an error."""


class _Assignment(NamedTuple):
    """One tensor of the checkpoint and the parameter, part of one, or buffer that it fills."""

    tensor_name: str
    parameter: torch.Tensor
    shard_id: str | None
    is_transposed: bool = False


def load_weights(
    model: torch.nn.Module,
    source: Path,
    config: ModelConfig,
    *,
    load_format: str = "auto",
    keep_quantized: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Fill the parameters of `model`, on the device and in the dtype they have, from `source`.

    Parameters have Hugging Face names, except that `model.stacked` (component of a checkpoint's
    name -> component of the parameter's name, shard id) joins several tensors in one parameter. A
    parameter's `sharding` tells which parts of which tensors it holds; no others are read. Its
    `weight_loader(parameter, tensor, shard_id)`, if it has one, takes what is read. Buffers with a
    `weight_loader` are filled from what the checkpoint has of them. `model.parameter_name` knows
    names of another style, `model.transposed` which matrices lie the other way,
    `model.is_elsewhere` which parameters another stage has. Names and shapes
    are checked before anything is read: ValueError names the tensors that are missing, left over or
    of a wrong shape. With `load_format` dummy, `source` is not touched. With `keep_quantized`,
    linear layers whose tensors are stored in groups of few bits get them as they are
    (`Linear.packed`).
    """
    if load_format == "dummy":
        fill_dummy_weights(model, seed)
        return
    checkpoint = open_checkpoint(source, config, load_format)
    try:
        assignments = _assign(model, checkpoint, source, config)
        if keep_quantized:
            assignments = _load_quantized(model, checkpoint, source, assignments)
        if progress:
            from tqdm import tqdm

            steps = tqdm(assignments, desc="Loading weights", unit="tensor", leave=False)
        else:
            steps = assignments
        with torch.no_grad():
            for assignment in steps:
                _load(checkpoint, source, assignment)
            checkpoint.finish()
    finally:
        checkpoint.close()


def _load_quantized(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    source: Path,
    assignments: list[_Assignment],
) -> list[_Assignment]:
    """Pack what is stored in groups of few bits; the assignments that are left to do."""
    linear_of = {id(m.weight): m for m in model.modules() if isinstance(m, Linear)}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, Embedding)}
    parts: dict[int, list[_Assignment]] = defaultdict(list)
    for assignment in assignments:
        if id(assignment.parameter) in linear_of:
            parts[id(assignment.parameter)].append(assignment)
    done: set[str] = set()
    for parameter_id, shards in parts.items():
        linear = linear_of[parameter_id]
        shards = sorted(shards, key=_first_row)
        weights = [
            checkpoint.read_quantized(shard.tensor_name, region)
            for shard in shards
            for region, _ in _regions(shard)
        ]
        quantized = [weight for weight in weights if weight is not None]
        rows = sum(weight.quants.shape[0] for weight in quantized)
        if len(quantized) < len(weights) or rows != linear.weight.shape[0]:
            continue  # the latter of a padded vocabulary
        linear.packed = pack(quantized)
        if parameter_id not in embedded:
            done.update(shard.tensor_name for shard in shards)
    if not parts or not any(linear.packed is not None for linear in linear_of.values()):
        raise ValueError(f"{source} has no quantized tensors that a linear layer could keep")
    return [a for a in assignments if a.tensor_name not in done]


def _first_row(shard: _Assignment) -> int:
    return min((target.start or 0 for _, (target, _) in _regions(shard)), default=0)


def _regions(assignment: _Assignment) -> list[tuple[Region, Region]]:
    """The parts of the tensor that are wanted, as it lies transposed, and where they go."""
    sharding: Sharding | None = getattr(assignment.parameter, "sharding", None)
    if sharding is None:
        return [(WHOLE, WHOLE)]
    shard_id = assignment.shard_id
    lie = Region if sharding.dim == 0 else lambda columns: Region(columns=columns)
    regions = [(lie(source), lie(target)) for source, target in sharding.parts[shard_id]]
    return [(WHOLE, regions[0][1])] if sharding.is_whole(shard_id) else regions


def _load(checkpoint: Checkpoint, source: Path, assignment: _Assignment) -> None:
    name, parameter, shard_id, is_transposed = assignment
    weight_loader = getattr(parameter, "weight_loader", None)
    for region, target in _regions(assignment):
        destination = parameter.data[target.of(tuple(parameter.shape))]
        part = Region(region.columns, region.rows) if is_transposed else region
        if weight_loader is None:
            checkpoint.read_into(name, destination.T if is_transposed else destination, part)
            continue
        tensor = checkpoint.read(name, parameter.dtype)
        tensor = tensor[part.of(tuple(tensor.shape))]
        try:
            weight_loader(destination, tensor.T if is_transposed else tensor, shard_id)
        except ValueError as error:
            raise ValueError(f"{source}: tensor {name!r}: {error}") from None


def _assign(
    model: torch.nn.Module, checkpoint: Checkpoint, source: Path, config: ModelConfig
) -> list[_Assignment]:
    parameters = dict(model.named_parameters())
    buffers = {n: b for n, b in model.named_buffers() if hasattr(b, "weight_loader")}
    stacked: dict[str, tuple[str, str]] = getattr(model, "stacked", {})
    transposed: tuple[str, ...] = getattr(model, "transposed", ())
    rename: Callable[[str], str | None] = getattr(model, "parameter_name", lambda name: name)
    is_elsewhere: Callable[[str], bool] = getattr(model, "is_elsewhere", lambda name: False)
    assignments, leftover, misshapen = [], [], []
    filled = set()
    for name, shape in checkpoint.shapes.items():
        known_as = rename(name)
        is_tied_head = config.tie_word_embeddings and known_as == "lm_head.weight"
        if known_as is None or is_tied_head or name.endswith(_NOT_WEIGHTS):
            continue
        if is_elsewhere(known_as):
            continue
        buffer = buffers.get(_CACHE_SCALE.sub(r"\1.\2", known_as))
        if buffer is not None:
            assignments.append(_Assignment(name, buffer, None))
            continue
        is_transposed = name.endswith(transposed) and len(shape) == 2
        if is_transposed:
            shape = shape[::-1]
        parameter_name, shard_id = _destination(known_as, stacked)
        parameter = parameters.get(parameter_name)
        if parameter is None:
            leftover.append(name)
            continue
        wanted = _whole_shape(parameter, shard_id)
        if wanted is not None and shape != wanted:
            misshapen.append(f"{name} {list(shape)} instead of {list(wanted)}")
        filled.add((parameter_name, shard_id))
        assignments.append(_Assignment(name, parameter, shard_id, is_transposed))
    missing = [
        name
        for name, destination in _expected(parameters, stacked).items()
        if destination not in filled
    ]
    for problem, names in (
        ("lacks tensors", missing),
        ("has unknown tensors", leftover),
        ("has misshapen tensors", misshapen),
    ):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ValueError(f"{source} {problem}: {', '.join(names[:_MAX_NAMED])}{more}")
    return assignments


def _whole_shape(parameter: torch.Tensor, shard_id: str | None) -> tuple[int, ...] | None:
    """Of the tensor that fills the parameter or its shard; None where its loader knows."""
    sharding: Sharding | None = getattr(parameter, "sharding", None)
    if sharding is not None:
        return sharding.shapes[shard_id]
    return None if hasattr(parameter, "weight_loader") else tuple(parameter.shape)


def _destination(name: str, stacked: dict[str, tuple[str, str]]) -> tuple[str, str | None]:
    """The parameter a tensor belongs to, and its shard id in it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in stacked:
            parts[i], shard_id = stacked[part]
            return ".".join(parts), shard_id
    return name, None


def _expected(
    parameters: dict[str, torch.nn.Parameter], stacked: dict[str, tuple[str, str]]
) -> dict[str, tuple[str, str | None]]:
    """Every tensor the checkpoint must hold -> what it fills."""
    parts_of = defaultdict(list)
    for component, (joined, shard_id) in stacked.items():
        parts_of[joined].append((component, shard_id))
    expected: dict[str, tuple[str, str | None]] = {}
    for name in parameters:
        module = next((part for part in name.split(".") if part in parts_of), None)
        if module is None:
            expected[name] = (name, None)
            continue
        before, after = name.split(f"{module}.", 1)
        for component, shard_id in parts_of[module]:
            expected[f"{before}{component}.{after}"] = (name, shard_id)
    return expected
