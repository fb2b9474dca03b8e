"""Logits -> the next token of each sequence."""

from __future__ import annotations

import torch

from nano_vllm import ops
from nano_vllm.outputs import Logprob
from nano_vllm.sampling.logprobs import logprob_entries
from nano_vllm.sampling.penalties import apply_penalties, has_penalties
from nano_vllm.sampling.philox import uniforms
from nano_vllm.sampling.token_masks import apply_token_masks, has_token_masks
from nano_vllm.sampling.truncation import has_nucleus, min_p_floors, raise_floors
from nano_vllm.sequence import Sequence

ROWS_AT_ONCE = 32
"""Rows whose adjusted logits exist at the same time, in float32."""
_NOT_FINITE = -1
_NOTHING_ALLOWED = -2
_FAILURES = {
    _NOT_FINITE: "the model's logits are not finite",
    _NOTHING_ALLOWED: "no token is left: allowed_token_ids, bad_words, min_tokens or penalties "
    "rule out all of them",
}


class Sampler:
    """Chooses a token from each row of logits, as the row's sequence wants it.

    In this order: repetition, frequency and presence penalties; logit_bias; allowed_token_ids;
    bad_words and min_tokens; temperature; top-k; top-p; min-p; the draw. Log-probabilities are
    those of the raw logits. Only what a row asks for is computed; a greedy batch draws no numbers.

    A draw is one number, looked up in the row's cumulative probabilities. It comes from a counter
    based generator and depends on (seed + completion index, position) alone, or, without a seed, on
    (engine seed, sequence number, position): never on what else is in the batch.

    Args:
        seed: the engine's.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def choose(
        self, logits: torch.Tensor, sequences: list[Sequence], lead: int = 0
    ) -> torch.Tensor:
        """Sample one token per row; without waiting for the device where `can_sample_ahead`.

        Args:
            logits: [num_rows, vocab_size], any floating dtype; not changed.
            sequences: of the rows.
            lead: tokens that the sequences do not know yet; above 0 only where all of them
                `can_sample_ahead`.

        Returns:
            [num_rows], int64; below 0 for a row that has no token: its maximum is NaN or infinite,
            or no token is allowed.
        """
        adjusted = [row for row, sequence in enumerate(sequences) if _is_adjusted(sequence)]
        assert not (adjusted and lead), "a draw that needs tokens which are not known"
        if not adjusted:
            return self._draw(logits, sequences, lead)
        token_ids = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        adjusted_set = set(adjusted)
        plain = [row for row in range(len(sequences)) if row not in adjusted_set]
        if plain:
            token_ids[plain] = self._draw(_select(logits, plain), [sequences[row] for row in plain])
        for low in range(0, len(adjusted), ROWS_AT_ONCE):
            part = adjusted[low : low + ROWS_AT_ONCE]
            rows = _select(logits, part)
            token_ids[part] = self._choose_adjusted(rows, [sequences[row] for row in part])
        return token_ids

    def describe(
        self, token_ids: list[int], logits: torch.Tensor, sequences: list[Sequence]
    ) -> tuple[dict[int, dict[int, Logprob]], dict[int, str]]:
        """What is to be said of the tokens chosen.

        Args:
            token_ids: from `choose`, as are the logits and the sequences.

        Returns:
            log-probabilities of the rows that ask for them, and for rows without a token the
            reason.
        """
        failures = {row: _FAILURES[t] for row, t in enumerate(token_ids) if t < 0}
        rows = [
            row
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None and row not in failures
        ]
        if not rows:
            return {}, failures
        counts = [sequences[row].params.logprobs or 0 for row in rows]
        chosen = [token_ids[row] for row in rows]
        entries = logprob_entries(_select(logits, rows), chosen, counts)
        return dict(zip(rows, entries, strict=True)), failures

    def _choose_adjusted(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        logits = logits.float()
        finite = logits.amax(dim=-1).isfinite()
        if any(map(has_penalties, sequences)):
            logits = apply_penalties(logits, sequences)
        if any(map(has_token_masks, sequences)):
            logits = apply_token_masks(logits, sequences)
        token_ids = self._draw(logits, sequences)
        return token_ids.where(token_ids >= 0, _NOTHING_ALLOWED).where(finite, _NOT_FINITE)

    def _draw(self, logits: torch.Tensor, sequences: list[Sequence], lead: int = 0) -> torch.Tensor:
        params = [sequence.params for sequence in sequences]
        token_ids = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        if all(p.greedy for p in params):
            zeros = torch.zeros(len(sequences), dtype=torch.float64, device=logits.device)
            ops.sample_tokens(token_ids, logits, zeros, zeros, zeros)
            return token_ids
        temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64)
        numbers = torch.stack((temperatures, min_p_floors(params), self._uniforms(sequences, lead)))
        # Not waited for: the device may still be busy with the logits.
        temperatures, floors, draws = numbers.to(logits.device, non_blocking=True)
        raise_floors(floors, logits, params)
        ops.sample_tokens(token_ids, logits, temperatures, floors, draws)
        return token_ids

    def _uniforms(self, sequences: list[Sequence], lead: int) -> torch.Tensor:
        keys, streams = [], []
        for sequence in sequences:
            seed = sequence.params.seed
            keys.append(self._seed if seed is None else seed + sequence.index)
            streams.append(sequence.seq_id + 1 if seed is None else 0)
        positions = [sequence.num_output_tokens + lead for sequence in sequences]
        return torch.from_numpy(uniforms(keys, positions, streams))


def can_sample_ahead(sequence: Sequence) -> bool:
    """Whether the token behind the next one can be drawn before that is known: it depends on it by
    the model alone, nobody asks for logits after the draw, and the draw does not wait for the
    device.
    """
    return not (
        _is_adjusted(sequence)
        or sequence.params.logprobs is not None
        or has_nucleus(sequence.params)
    )


def _is_adjusted(sequence: Sequence) -> bool:
    return has_penalties(sequence) or has_token_masks(sequence)


def _select(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
