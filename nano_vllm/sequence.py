"""One token sequence on its way through the engine."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from nano_vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nano_vllm.logprob import Logprob


class SequenceStatus(Enum):
    WAITING = "waiting"
    """Has no blocks: new, or preempted."""
    PREFILL = "prefill"
    """Has blocks; tokens known before the last one are still to be computed."""
    RUNNING = "running"
    """Everything but the last token is computed: each step adds one."""
    FINISHED = "finished"


class Sequence:
    """The tokens of one completion, and how far the cache has them.

    Invariants: num_computed_tokens <= num_tokens; block_table covers every computed or scheduled
        token while the sequence holds blocks and is empty otherwise; none of its first
        num_freed_blocks is seen by a token that is still to be computed; output_token_ids only
        grows. While the sequence runs, its lists grow in place, from C++ (DecodeRows).
    """

    __slots__ = (
        "seq_id",
        "request_id",
        "index",
        "params",
        "status",
        "token_ids",
        "num_prompt_tokens",
        "end_token_ids",
        "bad_words",
        "is_followed",
        "is_streamed",
        "priority",
        "cache_root",
        "max_num_tokens",
        "arrival",
        "is_protected",
        "_num_computed_tokens",
        "decode_row",
        "num_cached_tokens",
        "num_preemptions",
        "block_table",
        "num_freed_blocks",
        "block_hashes",
        "output_logprobs",
        "prompt_logprobs",
        "cumulative_logprob",
        "finish_reason",
        "stop_reason",
    )

    def __init__(
        self,
        seq_id: int,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        end_token_ids: frozenset[int] = frozenset(),
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.index = index
        """Which of the request's n completions this is."""
        self.params = params
        self.end_token_ids = end_token_ids
        """Tokens that end the sequence: end-of-sequence (unless ignored) and stop tokens."""
        self.bad_words = bad_words
        """Token sequences that the output never completes."""
        self.is_followed = True  # set by Engine
        """Whether somebody looks at each of its tokens, and not at all of them at its end."""
        self.is_streamed = False  # set by Engine
        """Whether somebody waits for each of its tokens."""
        self.priority = 0  # set by Engine, as is the next
        """The lowest number goes first, where priorities count."""
        self.cache_root = b""
        """What stands before the first block's content in its hash: equal tokens are shared among
        sequences of equal roots. b"" or 16 bytes.
        """
        self.max_num_tokens = 0  # set by Scheduler, as are the next seven
        """It ends for its length with so many."""
        self.arrival = 0
        """Rises from request to request."""
        self.is_protected = False
        """Whether it has waited, or been preempted, so often that it goes before all others."""
        self.status = SequenceStatus.WAITING
        self._num_computed_tokens = 0
        self.decode_row = -1
        """Id among the DecodeRows while it runs."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache when the sequence was first admitted."""
        self.num_preemptions = 0
        self.token_ids = list(prompt_token_ids)
        """Prompt and output."""
        self.num_prompt_tokens = len(prompt_token_ids)
        self.block_table: list[int] = []  # set by BlockManager, as are the next two
        self.num_freed_blocks = 0
        """Leading blocks of the table that lie behind the sliding window: they may be others' by
        now, and nobody reads them.
        """
        self.block_hashes: list[bytes] = []
        """Content hashes of the leading full blocks, as far as they are committed."""
        self.output_logprobs: list[
            dict[int, Logprob]
        ] = []  # set by Scheduler.update, as are all below
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are in the cache."""
        if self.status is SequenceStatus.RUNNING:
            return len(self.token_ids) - 1
        return self._num_computed_tokens

    @num_computed_tokens.setter
    def num_computed_tokens(self, count: int) -> None:
        self._num_computed_tokens = count

    @property
    def held_blocks(self) -> list[int]:
        """Those of the table that are not freed."""
        return self.block_table[self.num_freed_blocks :]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose keys and values are not in the cache."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request_id}[{self.index}], {self.status.value}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens, {len(self.block_table)} blocks)"
        )
