"""A text that grows, forks and goes back, without being computed again."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from nano_vllm.engine.prompts import Prompt, cache_salt_of, parse_prompt
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nano_vllm.engine.llm import LLM


class Session:
    """Tokens whose keys and values the cache has, or had: what is generated next begins there.

    Blocks are found by their content. So a fork costs nothing: both go on from the blocks they have
    in common, and write into blocks of their own. Of a session that is not pinned, blocks may be
    evicted; they are computed again when they are needed. Made by `LLM.session`.

    Args:
        llm: where it runs.
        token_ids: the tokens so far, at least one.
        cache_salt: blocks are shared with prompts of the same salt alone.
    """

    def __init__(self, llm: LLM, token_ids: list[int], cache_salt: str | None = None) -> None:
        self._llm = llm
        self._token_ids = list(token_ids)
        self._cache_salt = cache_salt
        self._pin: int | None = None
        self._is_closed = False

    @property
    def token_ids(self) -> list[int]:
        """All tokens: prompts, and what was generated behind them."""
        return list(self._token_ids)

    @property
    def text(self) -> str:
        """Of all tokens, without special ones."""
        return self._llm.get_tokenizer().decode(self._token_ids)

    @property
    def cache_salt(self) -> str | None:
        return self._cache_salt

    @property
    def is_pinned(self) -> bool:
        return self._pin is not None

    def generate(
        self, sampling_params: SamplingParams | None = None, prompt: Prompt | None = None
    ) -> RequestOutput:
        """Go on from here; the session then ends with what was generated.

        Args:
            sampling_params: of one completion; by default SamplingParams().
            prompt: put behind the session's tokens first, in the forms of `LLM.generate`; a text is
                encoded without special tokens.
        """
        length = len(self._token_ids)
        if prompt is not None:
            self.append(prompt)
        try:
            return self._llm.generate_sessions([self], sampling_params, use_tqdm=False)[0]
        except BaseException:
            del self._token_ids[length:]
            raise

    def append(self, prompt: Prompt) -> None:
        """Put tokens behind the others; they are computed with what is generated next. ValueError
        for what are no tokens; the session stays as it was.

        A tokenizer that puts a space before each text (SentencePiece's do) puts one before this.
        """
        self.check_open()
        if cache_salt_of(prompt) is not None:
            raise ValueError("a session keeps the cache_salt that it began with")
        tokenizer = self._llm.engine.tokenizer
        text, token_ids = parse_prompt(prompt, tokenizer)
        if text is not None and tokenizer is not None:
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        if token_ids:
            self._llm.check_tokens(token_ids)
        self._token_ids += token_ids

    def fork(self, n: int = 1) -> list[Session]:
        """Sessions that begin with the same tokens and go their own ways; none is pinned."""
        self.check_open()
        if type(n) is not int or n < 1:  # type(), as True is an int
            raise ValueError(f"n must be an integer of at least 1, got {n!r}")
        return [Session(self._llm, self._token_ids, self._cache_salt) for _ in range(n)]

    def rollback(self, num_tokens: int) -> None:
        """Drop the last tokens; one stays at least. ValueError for more than there are."""
        self.check_open()
        most = len(self._token_ids) - 1
        if type(num_tokens) is not int or not 0 <= num_tokens <= most:
            raise ValueError(f"num_tokens must be in [0, {most}], got {num_tokens!r}")
        del self._token_ids[len(self._token_ids) - num_tokens :]
        self._follow_with_pin()

    def pin(self) -> None:
        """Keep its full blocks from eviction; what is missing is computed now. Those to come are
        kept too, unless there is no room for what a `generate` has added.

        Raises ValueError where a sequence of max_model_len would not fit beside what is pinned.
        """
        self.check_open()
        if not self.is_pinned:
            self._llm.compute(self._token_ids, self._cache_salt)
            self._renew_pin()

    def unpin(self) -> None:
        """Leave its blocks to eviction; nothing happens where it is not pinned."""
        if self._pin is not None:
            self._llm.engine.unpin(self._pin)
            self._pin = None

    def close(self) -> None:
        """Give up what it holds; it cannot be used any more."""
        self.unpin()
        self._is_closed = True

    def extend(self, token_ids: list[int]) -> None:
        """Take in what was generated. For LLM."""
        self._token_ids += token_ids
        self._follow_with_pin()

    def check_open(self) -> None:
        """ValueError for one that is closed."""
        if self._is_closed:
            raise ValueError("the session is closed")

    def check_belongs_to(self, llm: LLM) -> None:
        """ValueError for one of another LLM."""
        if llm is not self._llm:
            raise ValueError("the session belongs to another LLM")

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({len(self._token_ids)} tokens{', pinned' if self.is_pinned else ''})"

    def _follow_with_pin(self) -> None:
        if self.is_pinned:
            with suppress(ValueError):  # no room: the pin stays as it was
                self._renew_pin()

    def _renew_pin(self) -> None:
        """Pin what there is of it now."""
        new = self._llm.engine.pin(self._token_ids, self._cache_salt)
        self.unpin()
        self._pin = new
