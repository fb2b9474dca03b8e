"""Random weights, for benchmarks of a model's speed without its checkpoint."""

from __future__ import annotations

import torch

_BOUND = 0.035
"""Of the uniform distribution: standard deviation 0.02, as most decoders are initialized."""


def fill_dummy_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter where it lies: norms with ones, the rest uniformly; the same for the
    same seed and device.
    """
    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.split(".")[-2:][0]:
                parameter.fill_(1.0)
                continue
            if parameter.device not in generators:
                generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
            parameter.uniform_(-_BOUND, _BOUND, generator=generators[parameter.device])
