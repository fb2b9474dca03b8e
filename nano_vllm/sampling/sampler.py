"""Logits -> the next token of each sequence."""

from __future__ import annotations

import torch

from nano_vllm import ops
from nano_vllm.logprob import Logprob
from nano_vllm.sampling.logprobs import logprob_entries, logprob_table
from nano_vllm.sampling.sampling_rows import (
    RequestTable,
    SamplingRows,
    can_be_adjusted,
    rows_with_logprobs,
)
from nano_vllm.sampling.token_history import TokenHistory
from nano_vllm.sequence import Sequence

_NOT_FINITE = "the model's logits are not finite"
_NOTHING_ALLOWED = (
    "no token is left: allowed_token_ids, bad_words, min_tokens or penalties rule out all of them"
)


class Sampler:
    """Chooses a token from each row of logits, as the row's sequence wants it.

    In this order: repetition, frequency and presence penalties; logit_bias; allowed_token_ids;
    bad_words and min_tokens; temperature; top-k; top-p; min-p; the draw. Log-probabilities are
    those of the raw logits. All of it is one kernel, behind another for rows whose logits are
    adjusted; nothing waits for the device, nor for tokens that only the device knows.

    A draw is one number, looked up in the row's cumulative probabilities. It comes from a counter
    based generator and depends on (seed + completion index, position) alone, or, without a seed, on
    (engine seed, sequence number, position): never on what else is in the batch.

    Args:
        max_model_len: tokens of a sequence at the most.
        seed: the engine's.
    """

    def __init__(self, max_model_len: int, seed: int = 0) -> None:
        self._table = RequestTable(seed)
        self._history = TokenHistory(max_model_len)
        self._rows: SamplingRows | None = None
        """Of the last step."""

    def choose(
        self,
        logits: torch.Tensor,
        sequences: list[Sequence],
        seq_lens: torch.Tensor,
        new_token_ids: torch.Tensor,
        num_ahead: int = 0,
    ) -> torch.Tensor:
        """Sample one token per row.

        Args:
            logits: [num_rows, vocab_size], any floating dtype; not changed.
            sequences: of the rows. Given the same list as in the step before, which nobody
                changes, nothing is made anew.
            seq_lens: [num_rows], int32; tokens of each sequence.
            new_token_ids: [num_rows], int64; the last of these.
            num_ahead: leading rows whose sequences do not know their last token yet, which seq_lens
                counts.

        Returns:
            [num_rows], int64; below 0 for a row that has no token: its maximum is NaN or infinite,
            or no token is allowed.
        """
        rows = self._rows_of(sequences, num_ahead, logits.device)
        if rows.steps_left is not None:
            rows.steps_left -= 1
        adjusted = None
        if rows.adjustments:
            shape = rows.num_adjusted, logits.shape[1]
            adjusted = logits.new_empty(shape, dtype=torch.float32)
            ops.adjust_logits(
                adjusted,
                logits,
                token_ids=self._history.token_ids,
                new_token_ids=new_token_ids,
                seq_lens=seq_lens,
                **rows.adjustments,
            )
        token_ids = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
        ops.sample_tokens(token_ids, logits, seq_lens=seq_lens, adjusted=adjusted, **rows.draws)
        return token_ids

    def logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, sequences: list[Sequence]
    ) -> torch.Tensor | None:
        """The `logprob_table` of the rows that ask for log-probabilities; None if none does.

        Args:
            token_ids: from `choose`, as are the logits and the sequences.
        """
        assert self._rows is not None
        assert self._rows.sequences is sequences
        rows = self._rows.logprob_rows
        if not rows:
            return None
        if len(rows) < len(sequences):
            index = torch.tensor(rows).to(logits.device, non_blocking=True)
            logits, token_ids = logits.index_select(0, index), token_ids.index_select(0, index)
        most = max(sequences[row].params.logprobs or 0 for row in rows)
        return logprob_table(logits, token_ids.clamp(min=0), most)

    def num_candidates(
        self, sequences: list[Sequence], num_ahead: int, device: torch.device
    ) -> int:
        """What has to be gathered of rows that ranks share, as `gathering` says.

        Args:
            sequences: of the rows, as for `choose`, which may come next, as is num_ahead.
            device: of the logits.
        """
        return self._rows_of(sequences, num_ahead, device).num_candidates

    def _rows_of(
        self, sequences: list[Sequence], num_ahead: int, device: torch.device
    ) -> SamplingRows:
        rows = self._rows
        if rows is None or rows.sequences is not sequences or rows.steps_left == 0:
            rows = self._rows = SamplingRows(
                sequences, num_ahead, self._table, self._history, device
            )
        return rows


def describe(
    token_ids: list[int], logprobs: list[list[float]] | None, sequences: list[Sequence]
) -> tuple[dict[int, dict[int, Logprob]], dict[int, str]]:
    """What is to be said of the tokens chosen.

    Args:
        token_ids: from `Sampler.choose`.
        logprobs: from `Sampler.logprobs`.
        sequences: of the rows.

    Returns:
        log-probabilities of the rows that ask for them, and for rows without a token the reason.
    """
    failures = {}
    if min(token_ids, default=0) < 0:
        failures = {
            row: _NOTHING_ALLOWED if t == -2 and can_be_adjusted(sequences[row]) else _NOT_FINITE
            for row, t in enumerate(token_ids)
            if t < 0
        }
    if logprobs is None:
        return {}, failures
    rows = rows_with_logprobs(sequences)
    entries = logprob_entries(
        logprobs,
        [token_ids[row] for row in rows],
        [sequences[row].params.logprobs or 0 for row in rows],
    )
    reported = zip(rows, entries, strict=True)
    return {row: entry for row, entry in reported if row not in failures}, failures
