"""Random weights, for benchmarks of a model's speed without its checkpoint."""

from __future__ import annotations

import hashlib

import torch

from nano_vllm.distributed.sharding import Sharding

_BOUND = 0.035
"""Of the uniform distribution: standard deviation 0.02, as most decoders are initialized."""


def fill_dummy_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter where it lies: norms with ones, the rest uniformly; the same for the
    same seed and device, whoever shares the model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.split(".")[-2:][0]:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(parameter.device).manual_seed(_seed_of(name, seed))
            sharding: Sharding | None = getattr(parameter, "sharding", None)
            if sharding is None:
                parameter.uniform_(-_BOUND, _BOUND, generator=generator)
                continue
            if sharding.is_whole(None):
                (part,) = sharding.parts[None]
                held = _along(parameter, sharding.dim, part.target)
                held.uniform_(-_BOUND, _BOUND, generator=generator)
                continue
            whole = parameter.new_empty(sharding.shapes[None])
            whole.uniform_(-_BOUND, _BOUND, generator=generator)
            for source, target in sharding.parts[None]:
                _along(parameter, sharding.dim, target).copy_(_along(whole, sharding.dim, source))


def _along(tensor: torch.Tensor, dim: int, part: slice) -> torch.Tensor:
    return tensor.narrow(dim, part.start, part.stop - part.start)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
