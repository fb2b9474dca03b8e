"""Tokens made likelier, less likely or impossible: logit_bias, allowed_token_ids, bad_words,
min_tokens.
"""

from __future__ import annotations

import torch

from nano_vllm.sequence import Sequence

_MINUS_INFINITY = float("-inf")


def has_token_masks(sequence: Sequence) -> bool:
    params = sequence.params
    return bool(
        params.logit_bias or params.allowed_token_ids or sequence.bad_words or _must_go_on(sequence)
    )


def apply_token_masks(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Logits with the bias of each row's sequence; -inf for tokens that it must not take next.

    Args:
        logits: [num_rows, vocab_size], float32; not changed.
        sequences: of the rows.
    """
    logits = logits.clone()
    flat = logits.view(-1)
    vocab_size = logits.shape[-1]
    biased: dict[int, float] = {}
    banned: set[int] = set()
    for row, sequence in enumerate(sequences):
        start = row * vocab_size
        for token_id, bias in (sequence.params.logit_bias or {}).items():
            biased[start + token_id] = bias
        banned.update(start + token_id for token_id in _banned_tokens(sequence))
    if biased:
        index = torch.tensor(list(biased), device=logits.device)
        flat[index] += torch.tensor(
            list(biased.values()), dtype=torch.float32, device=logits.device
        )
    for row, sequence in enumerate(sequences):
        if sequence.params.allowed_token_ids:
            index = torch.tensor(sequence.params.allowed_token_ids, device=logits.device)
            allowed = logits[row, index]
            logits[row] = _MINUS_INFINITY
            logits[row, index] = allowed
    if banned:
        flat[torch.tensor(sorted(banned), device=logits.device)] = _MINUS_INFINITY
    return logits


def _banned_tokens(sequence: Sequence) -> set[int]:
    banned = set(sequence.end_token_ids) if _must_go_on(sequence) else set()
    num_output = sequence.num_output_tokens
    for *head, last in sequence.bad_words:
        # The whole of a bad word counts, not a tail whose head is in the prompt.
        if (
            len(head) <= num_output
            and sequence.token_ids[len(sequence.token_ids) - len(head) :] == head
        ):
            banned.add(last)
    return banned


def _must_go_on(sequence: Sequence) -> bool:
    """Whether min_tokens forbids an end here."""
    return sequence.num_output_tokens < sequence.params.min_tokens and bool(sequence.end_token_ids)
