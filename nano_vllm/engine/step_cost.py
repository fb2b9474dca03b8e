"""How long a step takes, learned from measured ones, and how much of a prompt fits into a time."""

from __future__ import annotations

from math import inf, sqrt

from nano_vllm.batch import StepWork

MIN_PREFILL_TOKENS = 4
"""A prompt goes on by so many tokens a step, whatever they cost."""
MIN_PREFILL_SHARE = 0.1
"""A prompt may lengthen a step by so much of what it takes without, however low the limit is."""
MIN_PREFILL_RETURN = 0.25
"""And by so much of what any part of it, were it one token, costs the step: streams that have to
wait for that are better off where the prompt is soon done.
"""

_ROWS, _CONTEXT, _TOKENS, _PAIRS = 1 / 64, 1 / 2**16, 1 / 2**8, 1 / 2**20
"""Units in which the features of usual steps are about 1."""
_FIRST_GUESS = 5e-3
"""Seconds of a step without prompts, until one was measured."""
_LEAST = 1e-5
"""Seconds; no step takes less."""
_GUESSED_TOKENS = 64
"""So many tokens of a prompt are thought to take as long as a step without. A careful guess: on a
GPU it takes several hundred."""
_GUESSED_CONTEXT = 8192
"""A token that attends over so many is thought to cost twice as much as one that sees none."""
_FIRST_DOUBT = 4.0
"""Times its guess that a first step with a prompt may take: beyond that something was loaded, as in
most first steps."""
_KNOWN_TOKENS = 32
"""A step of so many tokens is thought to be known from the start."""
_GROWTH = 2.0
"""Times what was measured lately that a step may be beyond it."""
_SLACK, _STEP_UP = 0.8, 1.25
"""Behind a step of less than _KNOWN_TOKENS that took less than this share of the limit, the next
may hold so many times its tokens. Steps of a few tokens alone do not tell what a token costs from
what any prompt costs: a model that is wrong about them would never see others."""
_RIDGE = 0.1
"""What a weight weighs against a measured step."""
_DECODE_MEMORY, _PREFILL_MEMORY = 0.98, 0.97
"""What is left of a step's influence after the next one of its kind."""
_CHANGED = 0.01
"""The same where the device has changed its speed."""
_DOUBT = 5.0
"""Mean errors by which a step may differ from what was predicted. Beyond that either it was held up
(a graph captured, a page read in), or the device has changed its speed."""
_CHANGED_STEPS = 5
"""So many steps in a row are not held up: the device has become slower."""


class StepCost:
    """A model of a step's time, fitted to each measured step, in constant time and memory.

        seconds = a + b * decode rows + c * context of the decodes
                  + max(0, d + e * prompt tokens + f * pairs of these and their context)

    Reading the weights is in `a`, and hides the products of a prompt's first tokens: `d` is below 0
    where it does, and above where steps with prompts have costs of their own (the host's, which
    decode steps hide). The other weights are at least 0: more work never takes less time.

    Each line has a memory of its own: hours of decodes do not wash away what a prompt costs.

    Args:
        saturating_tokens: of a prompt, whose attention keeps the whole device busy; that of fewer
            takes as long.
    """

    def __init__(self, saturating_tokens: int = 1) -> None:
        self.saturating_tokens = saturating_tokens
        self._decode = _Line(
            (_FIRST_GUESS, 0.0, 0.0), ridge=(_RIDGE, _RIDGE, _RIDGE), memory=_DECODE_MEMORY
        )
        self._decode.floor = _LEAST
        # Steps that the price of a token explains as well teach no overhead. A token has half the
        # unit of the pairs, so that both prices grow alike where nothing tells them apart.
        self._prefill = _Line(
            _guess_prefill(_FIRST_GUESS),
            ridge=(10 * _RIDGE, _RIDGE, 4 * _RIDGE),
            memory=_PREFILL_MEMORY,
        )
        self._prefill.reach = _KNOWN_TOKENS * _TOKENS
        self._prefill.first_doubt = _FIRST_DOUBT
        self._last = 0, inf
        """Tokens of prompts of the last step that had any, and its seconds."""

    def pairs(self, num_tokens: int, context: int) -> int:
        """Of so many tokens of a prompt and those that they attend over, behind `context` others of
        it: in units of attention's time, so that few tokens count as `saturating_tokens` do.
        """
        triangle = num_tokens * (num_tokens + 1) // 2
        return max(num_tokens, self.saturating_tokens) * context + triangle

    def knows(self, num_tokens: int) -> bool:
        """Whether steps with about as many tokens of prompts were measured lately."""
        return num_tokens * _TOKENS <= 1.25 * self._prefill.reach

    @property
    def doubts_decodes(self) -> bool:
        """Whether the last step without a prompt was so far off that more should be seen."""
        return self._decode.in_doubt

    def observe(self, work: StepWork, seconds: float) -> None:
        """Take in a measured step; one that took no time, or for ever, teaches nothing."""
        if not 0.0 < seconds < inf:
            return
        seconds = max(seconds, _LEAST)
        rows, context = work.num_decodes * _ROWS, work.decode_context * _CONTEXT
        base = self._decode.at(rows, context)
        if not work.prefill_tokens or seconds < base:
            # The second: its decodes alone were thought to take longer.
            self._decode.learn(rows, context, base, seconds)
            base = self._decode.at(rows, context)
            self._prefill.suppose(_guess_prefill(self._decode.weights[0]))
        if work.prefill_tokens:
            tokens, pairs = work.prefill_tokens * _TOKENS, work.prefill_pairs * _PAIRS
            self._last = work.prefill_tokens, seconds
            self._prefill.floor = -base
            self._prefill.learn(tokens, pairs, base + self._surplus(tokens, pairs), seconds)

    def predict(self, work: StepWork) -> float:
        """Seconds that a step takes."""
        seconds = self._decode.at(work.num_decodes * _ROWS, work.decode_context * _CONTEXT)
        if work.prefill_tokens:
            seconds += self._surplus(work.prefill_tokens * _TOKENS, work.prefill_pairs * _PAIRS)
        return seconds

    def max_prefill_tokens(
        self, limit: float, num_decodes: int, decode_context: int, prefill_context: int
    ) -> int:
        """Tokens of a prompt that a step may hold besides its decodes; more for a higher limit.

        Beyond what was measured lately a token counts at least what it was guessed to cost at
        first: there reading the weights may no longer hide it.

        Args:
            limit: seconds that the step may take.
            num_decodes: rows that decode.
            decode_context: tokens that these attend over, of all of them together.
            prefill_context: tokens of the prompt that are in the cache already.

        Returns:
            at least MIN_PREFILL_TOKENS, and what takes MIN_PREFILL_SHARE of a step without or
            MIN_PREFILL_RETURN of what it costs to have any.
        """
        base = self._decode.at(num_decodes * _ROWS, decode_context * _CONTEXT)
        overhead, per_token, per_pair = self._prefill.weights
        per_token, per_pair = per_token * _TOKENS, per_pair * _PAIRS
        few = self.saturating_tokens
        by_any = per_pair * few * prefill_context
        fixed = max(overhead, 0.0) + by_any
        least = fixed + max(MIN_PREFILL_SHARE * base, MIN_PREFILL_RETURN * fixed)
        room = max(limit - base, least) - overhead

        def slope_at(num_tokens: float) -> float:
            """What another token costs, without the pairs among those of the step."""
            return per_token + (per_pair * prefill_context if num_tokens > few else 0.0)

        def left_behind(num_tokens: float) -> float:
            pairs = max(num_tokens, few) * prefill_context + num_tokens * num_tokens / 2
            return room - per_token * num_tokens - per_pair * pairs

        known = self._prefill.reach / _TOKENS
        left = left_behind(known)
        if left < 0.0:
            is_few = left_behind(few) < 0.0
            slope = slope_at(few if is_few else few + 1)
            kept = room - by_any if is_few else room
            most = 2.0 * kept / (slope + sqrt(slope * slope + 2.0 * per_pair * kept))
        else:
            price = max(
                slope_at(known) + per_pair * known, self._decode.weights[0] / _GUESSED_TOKENS
            )
            most = min(known + left / price, _GROWTH * known)
        num_tokens, seconds = self._last
        if num_tokens < _KNOWN_TOKENS and seconds < _SLACK * limit:
            most = max(most, _STEP_UP * num_tokens)
        return max(int(most), MIN_PREFILL_TOKENS)

    def prompt_seconds(self, num_tokens: int, context: int) -> float:
        """What tokens of a prompt add to steps, behind `context` others of it."""
        pairs = num_tokens * (context + num_tokens / 2)
        _, per_token, per_pair = self._prefill.weights
        return per_token * num_tokens * _TOKENS + per_pair * pairs * _PAIRS

    def _surplus(self, tokens: float, pairs: float) -> float:
        return max(self._prefill.at(tokens, pairs), 0.0)


def _guess_prefill(base: float) -> tuple[float, float, float]:
    """Weights of the prefill's line, by the seconds of a step without."""
    token = base / _GUESSED_TOKENS
    return 0.0, token / _TOKENS, token / _GUESSED_CONTEXT / _PAIRS


class _Line:
    """Seconds as weights . (1, x, y), by least squares of relative errors that forgets the past.

    It keeps the moments of the steps, and with each step improves its weights from where they are,
    one after the other, none below its bound (coordinate descent). Weights that the steps do not
    tell apart stay as they were.

    Errors are relative, so a step that was held up for long weighs next to nothing. Several in a
    row that are much longer than predicted make the past forgotten, as does one that is much
    shorter: no device is faster by chance.

    Args:
        weights: before any step.
        ridge: for each weight, what holds it where it is.
        memory: what is left of a step's influence after the next.
    """

    def __init__(
        self,
        weights: tuple[float, float, float],
        ridge: tuple[float, float, float],
        memory: float,
    ) -> None:
        self.weights = weights
        self.floor = 0.0
        """Bound of the first weight; that of the others is 0."""
        self.error = 0.2
        """Mean relative error of the predictions, outliers aside."""
        self.reach = 0.0
        """The largest x of late."""
        self.first_doubt = inf
        """The first step is beyond all usual errors where it takes so many times the prediction."""
        self.in_doubt = False
        """Whether the last step was beyond all usual errors."""
        self._ridge = ridge
        self._memory = memory
        self._moments = (0.0,) * 10
        """Of the steps so far, each less by `memory` than the next: sums of 1, w, wx, wy, wxx, wxy,
        wyy, wt, wxt, wyt, with t the seconds, and w = 1 / (seconds of the whole step)^2."""
        self._num_longer = 0
        """Steps in a row that were far longer than predicted."""

    def at(self, x: float, y: float) -> float:
        c0, c1, c2 = self.weights
        return c0 + c1 * x + c2 * y

    def suppose(self, weights: tuple[float, float, float]) -> None:
        """Weights for the time being, if there was no step yet."""
        if not self._moments[0]:
            self.weights = weights

    def learn(self, x: float, y: float, predicted: float, seconds: float) -> None:
        """Take in a step.

        Args:
            x, y: its features.
            predicted: what the whole step was thought to take, more than 0.
            seconds: what it took.
        """
        memory = self._memory
        excess = seconds - predicted
        self.in_doubt = abs(excess) > _DOUBT * max(self.error, 0.01) * predicted
        if not self._moments[0]:
            self.in_doubt = False
            if seconds > self.first_doubt * predicted and self._num_longer < _CHANGED_STEPS:
                self._num_longer += 1
                return
        elif not self.in_doubt:
            self._num_longer = 0
            self.error += 0.1 * (abs(excess) / predicted - self.error)
        else:
            self._num_longer += 1
            if excess < 0.0 or self._num_longer == _CHANGED_STEPS:
                memory *= _CHANGED
                self._num_longer = 0
        self.reach = max(x, self._memory * self.reach)

        # The line may be below 0 where its part of a step is 0: then it is right, and stays.
        t = self.at(x, y) + excess
        w = 1.0 / (seconds * seconds)
        n, s, sx, sy, sxx, sxy, syy, st, sxt, syt = self._moments
        n = memory * n + 1.0
        s = memory * s + w
        sx = memory * sx + w * x
        sy = memory * sy + w * y
        sxx = memory * sxx + w * x * x
        sxy = memory * sxy + w * x * y
        syy = memory * syy + w * y * y
        st = memory * st + w * t
        sxt = memory * sxt + w * x * t
        syt = memory * syt + w * y * t
        self._moments = (n, s, sx, sy, sxx, sxy, syy, st, sxt, syt)

        r0, r1, r2 = (ridge * s / n for ridge in self._ridge)
        c0, c1, c2 = o0, o1, o2 = self.weights
        for _ in range(3):
            c1 = max((sxt + r1 * o1 - sx * c0 - sxy * c2) / (sxx + r1), 0.0)
            c2 = max((syt + r2 * o2 - sy * c0 - sxy * c1) / (syy + r2), 0.0)
            c0 = max((st + r0 * o0 - sx * c1 - sy * c2) / (s + r0), self.floor)
        self.weights = (c0, c1, c2)
