"""Repetition, frequency and presence penalties."""

from __future__ import annotations

import numpy as np
import torch

from nano_vllm.sequence import Sequence


def has_penalties(sequence: Sequence) -> bool:
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def apply_penalties(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Logits with the penalties of each row's sequence.

    The repetition penalty (arXiv 1909.05858) divides a positive logit and multiplies a negative one
    of each token in the prompt or the output. From each token in the output, the frequency penalty
    is then subtracted as often as it occurs, and the presence penalty once.

    Args:
        logits: [num_rows, vocab_size], float32; not changed.
        sequences: of the rows.
    """
    logits = logits.clone()
    flat = logits.view(-1)
    vocab_size = logits.shape[-1]
    # Places in `flat`, each at most once, and what is done there.
    places, factors = [], []
    for row, sequence in enumerate(sequences):
        factor = sequence.params.repetition_penalty
        if factor != 1.0:
            tokens = np.unique(np.array(sequence.token_ids, dtype=np.int64))
            places.append(tokens + row * vocab_size)
            factors.append(np.full(len(tokens), factor, dtype=np.float32))
    if places:
        index, factor_of = _to_device(places, factors, logits.device)
        seen = flat[index]
        flat[index] = torch.where(seen > 0, seen / factor_of, seen * factor_of)

    places, losses = [], []
    for row, sequence in enumerate(sequences):
        params = sequence.params
        if sequence.num_output_tokens and (params.frequency_penalty or params.presence_penalty):
            tokens, counts = np.unique(
                np.array(sequence.output_token_ids, dtype=np.int64), return_counts=True
            )
            places.append(tokens + row * vocab_size)
            losses.append(
                (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
            )
    if places:
        index, loss = _to_device(places, losses, logits.device)
        flat[index] = flat[index] - loss
    return logits


def _to_device(
    places: list[np.ndarray], values: list[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(np.concatenate(places)).to(device),
        torch.from_numpy(np.concatenate(values)).to(device),
    )
