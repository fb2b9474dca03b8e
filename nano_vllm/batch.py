"""One step's work, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from nano_vllm.sequence import Sequence

if TYPE_CHECKING:
    from nano_vllm._core import DecodeStep
    from nano_vllm.logprob import Logprob


@dataclass(slots=True)
class ScheduledSequence:
    """The tokens one sequence advances by."""

    sequence: Sequence
    num_tokens: int
    """Query length: 1 in decode, a chunk of the prompt in prefill."""
    samples: bool
    """Whether the last of these tokens is the sequence's last, so that a new one follows it."""
    start: int = -1
    """Position of the first of them, known tokens all; -1 in decode: `Batch.start` has it."""
    block_table: list[int] = field(default_factory=list)
    """Of the sequence, which may have lost it by the time that the step is known to have failed;
    empty in decode.
    """


@dataclass(slots=True)
class Batch:
    """What the next step computes, in the order of its rows. Set by Scheduler."""

    scheduled: list[ScheduledSequence]
    """The same list as that of the step before, where both have the same decodes and nothing else;
    not changed by anyone.
    """
    decodes: DecodeStep | None = None
    """The leading rows: sequences whose earlier tokens were computed before the step, and which
    advance by one."""
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """Copy-on-write copies (source block, destination block) to make before the step."""
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    """Evicted blocks to copy to host memory before all else (block, host block), in this order."""
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    """Blocks to copy from host memory next (host block, block)."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that lost their blocks to make room."""
    ahead_rows: list[int] | None = None
    """Of a step scheduled ahead, behind one that is still computed: for each of the decodes, which
    of the tokens that are sampled there it continues. The sequences do not know these tokens yet,
    nor count them.
    """

    @property
    def num_decodes(self) -> int:
        return 0 if self.decodes is None else len(self.decodes)

    @property
    def is_decode(self) -> bool:
        """Whether all rows are decodes."""
        return self.num_decodes == len(self.scheduled)

    @property
    def num_tokens(self) -> int:
        num_decodes = self.num_decodes
        return num_decodes + sum(s.num_tokens for s in self.scheduled[num_decodes:])

    @property
    def sampling_rows(self) -> list[int]:
        return [row for row, scheduled in enumerate(self.scheduled) if scheduled.samples]

    @property
    def lead(self) -> int:
        """Tokens that each of the decodes is ahead of what its sequence knows."""
        return 0 if self.ahead_rows is None else 1

    def start(self, row: int) -> int:
        """Position of the row's first token; before the step is taken in."""
        scheduled = self.scheduled[row]
        if row >= self.num_decodes:
            return scheduled.start
        return scheduled.sequence.num_computed_tokens + self.lead


class StepWork(NamedTuple):
    """What a step has to do, as far as its time goes by it."""

    num_decodes: int
    decode_context: int
    """Tokens that the decodes attend over, of all of them together."""
    prefill_tokens: int
    prefill_pairs: int
    """Of a prompt's token in the step and one that it attends over; see `StepCost.pairs`."""


@dataclass(slots=True)
class StepResult:
    """What came of each row of Batch.scheduled. Set by ModelRunner."""

    token_ids: list[int]
    """The next token of each row; below 0 where it does not sample, and where it failed."""
    failures: dict[int, str] = field(default_factory=dict)
    """Row -> why it cannot go on (non-finite logits); the other rows are unharmed."""
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)
    """Row -> its token's own entry and those of the likeliest ones, where asked for."""
    prompt_logprobs: dict[int, list[dict[int, Logprob]]] = field(default_factory=dict)
    """Row -> entries for the prompt tokens that this step's logits predict, where asked for."""
