"""Sessions grow, fork and go back; what they generate is what plain prompts of their tokens do."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nano_vllm.engine.llm import LLM
from nano_vllm.engine.session import Session
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    make_engine,
    make_tokenizer,
    reference_tokens,
)

MAX_MODEL_LEN = 128
SIZE = 8


def make_llm(
    num_blocks: int = 64, tokenizer: bool = False, num_host_blocks: int = 0, **options: Any
) -> LLM:
    runner = FakeRunner(num_blocks, SIZE, MAX_MODEL_LEN, num_host_blocks=num_host_blocks)
    return LLM.from_engine(make_engine(runner, make_tokenizer() if tokenizer else None, **options))


def params(max_tokens: int = 9, **options: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "ignore_eos": True, "max_tokens": max_tokens, **options})


def expected(token_ids: list[int], own: SamplingParams) -> list[int]:
    return reference_tokens(token_ids, own, 0, MAX_MODEL_LEN)


def full_blocks(num_tokens: int) -> int:
    """Tokens of a prompt that can be found in the cache."""
    return (num_tokens - 1) // SIZE * SIZE


def flood(llm: LLM, count: int = 12, seed: int = 0) -> None:
    """Prompts of others, that fill the pool more than once."""
    draw = random.Random(f"flood {seed}")
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(100)] for _ in range(count)]
    outputs = llm.generate(prompts, params(20), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [expected(p, params(20)) for p in prompts]


def num_held_blocks(llm: LLM) -> int:
    metrics = llm.get_metrics()
    return metrics.num_blocks - metrics.num_free_blocks


def cached_by(llm: LLM, token_ids: list[int]) -> int:
    """Tokens of a prompt that are found in the cache now."""
    return llm.generate([token_ids], params(1), use_tqdm=False)[0].num_cached_tokens


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("group", range(4))
def test_whatever_is_done_equals_plain_prompts(group: int, caching: bool) -> None:
    """Random sessions of one pool, which is too small for all, beside plain prompts."""
    draw = random.Random(f"{group} {caching}")
    llm = make_llm(
        num_blocks=draw.choice([36, 60]),
        enable_prefix_caching=caching,
        max_num_seqs=draw.choice([2, 16]),
        num_host_blocks=draw.choice([0, 10, 100]) if caching else 0,
    )
    lists: dict[Session, list[int]] = {}

    def begin() -> None:
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 60))]
        salt = draw.choice([None, "a"])
        session = llm.session({"prompt_token_ids": prompt, "cache_salt": salt})
        assert session.cache_salt == salt
        lists[session] = prompt

    begin()
    for _ in range(150):
        session = draw.choice(list(lists))
        mine = lists[session]
        action = draw.choice(["begin", "generate", "batch", "append", "fork", "back", "pin", "end"])
        if action == "begin" and len(lists) < 6:
            begin()
        elif action == "generate" and len(mine) < 100:
            more = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(3))]
            own = params(draw.randrange(1, 12), seed=draw.randrange(9), ignore_eos=False)
            output = session.generate(own, more or None)
            mine += more
            assert output.prompt_token_ids == mine
            assert output.outputs[0].token_ids == expected(mine, own)
            mine += output.outputs[0].token_ids
        elif action == "batch":
            some = [s for s in lists if len(lists[s]) < 100 and draw.random() < 0.6]
            own = params(draw.randrange(1, 12), seed=draw.randrange(9))
            for each, output in zip(
                some, llm.generate_sessions(some, own, use_tqdm=False), strict=True
            ):
                assert output.outputs[0].token_ids == expected(lists[each], own)
                lists[each] += output.outputs[0].token_ids
        elif action == "append" and len(mine) < 100:
            more = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(20))]
            session.append(more)
            mine += more
        elif action == "fork" and len(lists) < 8:
            for fork in session.fork(draw.randrange(1, 4)):
                assert not fork.is_pinned
                assert fork.cache_salt == session.cache_salt
                lists[fork] = list(mine)
        elif action == "back":
            count = draw.randrange(len(mine))
            session.rollback(count)
            del mine[len(mine) - count :]
        elif action == "pin" and caching and len(mine) < 100:
            if session.is_pinned:
                session.unpin()
            elif not any(s.is_pinned for s in lists):
                session.pin()
                assert num_held_blocks(llm) == len(mine) // SIZE
        elif action == "end" and len(lists) > 1:
            session.close()
            del lists[session]
        if any(s.is_pinned and len(lists[s]) >= 100 for s in lists):
            next(s for s in lists if s.is_pinned).unpin()
        assert all(each.token_ids == tokens for each, tokens in lists.items())
        llm.engine.scheduler.block_manager.allocator.check_integrity()
        assert not llm.engine.scheduler.reclaim_leaks()
        if not any(s.is_pinned for s in lists):
            assert num_held_blocks(llm) == 0
    assert llm.get_metrics().num_leaked_blocks == 0


def test_the_result_is_reported_as_of_a_prompt() -> None:
    llm = make_llm(tokenizer=True)
    session = llm.session("Once upon")
    output = session.generate(params(3), " a time")
    text = session.text
    assert text.startswith("Once upon a time")
    assert session.token_ids == output.prompt_token_ids + output.outputs[0].token_ids
    assert repr(session) == f"Session({len(session.token_ids)} tokens)"


def test_token_ids_are_a_copy() -> None:
    prompt = [1, 2, 3]
    session = make_llm().session(prompt)
    prompt.append(4)
    session.token_ids.append(5)
    fork = session.fork()[0]
    fork.append([6])
    assert session.token_ids == [1, 2, 3]


def test_a_conversation_hits_its_own_history() -> None:
    llm = make_llm()
    draw = random.Random(0)
    session = llm.session([draw.randrange(VOCAB_SIZE) for _ in range(30)])
    known = 0
    for _ in range(6):
        turn = [draw.randrange(VOCAB_SIZE) for _ in range(5)]
        output = session.generate(params(7), turn)
        # The last token generated is not computed yet.
        assert output.num_cached_tokens == known // SIZE * SIZE
        known = len(session.token_ids) - 1
    # The same turns as plain prompts find it too.
    assert cached_by(llm, [*session.token_ids, 5]) == known // SIZE * SIZE


def test_forks_share_their_blocks() -> None:
    llm = make_llm(num_blocks=64)
    prompt = list(range(64))
    session = llm.session(prompt)
    session.generate(params(1))
    forks = session.fork(5)
    own = [params(6, seed=seed) for seed in range(5)]
    requests = [llm._session_request(f, p) for f, p in zip(forks, own, strict=True)]
    for request in requests:
        llm.engine.add(request)
    llm.engine.step()
    # Eight blocks in common, and each one of its own; had they shared nothing, 45.
    assert num_held_blocks(llm) == 8 + 5
    outputs = []
    while llm.engine.has_work:
        outputs += llm.engine.step()
    assert [o.num_cached_tokens for o in outputs] == [64] * 5
    for output, each in zip(outputs, own, strict=True):
        assert output.outputs[0].token_ids == expected(session.token_ids, each)


def test_forks_go_their_own_ways() -> None:
    llm = make_llm()
    session = llm.session(list(range(20)))
    session.generate(params(3))
    at_fork = session.token_ids
    one, two = session.fork(2)
    first = one.generate(params(8, seed=4), [1])
    second = two.generate(params(8, seed=4), [2])
    assert first.outputs[0].token_ids == expected([*at_fork, 1], params(8, seed=4))
    assert second.outputs[0].token_ids == expected([*at_fork, 2], params(8, seed=4))
    assert session.token_ids == at_fork
    assert session.generate(params(8, seed=4)).outputs[0].token_ids == expected(
        at_fork, params(8, seed=4)
    )


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 16, 20])
@pytest.mark.parametrize("pinned", [False, True])
def test_after_a_rollback_it_is_as_if_never_generated(num_tokens: int, pinned: bool) -> None:
    llm = make_llm()
    session = llm.session(list(range(29)))
    if pinned:
        session.pin()
    session.generate(params(20))
    session.rollback(num_tokens)
    remaining = session.token_ids
    assert len(remaining) == 49 - num_tokens
    if pinned:
        assert num_held_blocks(llm) == len(remaining) // SIZE
    again = session.generate(params(20, seed=7), [3])
    assert again.outputs[0].token_ids == expected([*remaining, 3], params(20, seed=7))
    assert again.num_cached_tokens == full_blocks(len(remaining) + 1)


def test_pinned_blocks_survive_a_flood_and_others_do_not() -> None:
    llm = make_llm(num_blocks=30)
    draw = random.Random(1)
    kept, lost = (llm.session([draw.randrange(VOCAB_SIZE) for _ in range(45)]) for _ in range(2))
    kept.pin()
    assert kept.is_pinned
    assert "pinned" in repr(kept)
    assert num_held_blocks(llm) == 5
    lost.generate(params(10))
    kept.generate(params(10))
    assert num_held_blocks(llm) == 54 // SIZE
    flood(llm)
    assert cached_by(llm, kept.token_ids) == full_blocks(55)
    assert cached_by(llm, lost.token_ids) == 0
    flood(llm, seed=1)
    output = kept.generate(params(5))
    assert output.num_cached_tokens == full_blocks(55)
    kept.unpin()
    kept.unpin()
    assert not kept.is_pinned
    assert num_held_blocks(llm) == 0
    flood(llm, seed=2)
    assert cached_by(llm, kept.token_ids) == 0


def test_close_leaves_the_blocks_to_eviction() -> None:
    llm = make_llm(num_blocks=30)
    with llm.session(list(range(45))) as session:
        session.pin()
        assert num_held_blocks(llm) == 5
    assert num_held_blocks(llm) == 0
    flood(llm)
    assert cached_by(llm, list(range(45))) == 0


def test_pins_of_equal_blocks_count_once_and_each_holds_them() -> None:
    llm = make_llm(num_blocks=24)
    session = llm.session(list(range(60)))
    session.pin()
    forks = session.fork(4)
    for fork in forks:
        fork.pin()
    assert num_held_blocks(llm) == 7
    session.unpin()
    for fork in forks[1:]:
        fork.close()
    flood(llm)
    assert cached_by(llm, list(range(60))) == 56
    forks[0].close()
    assert num_held_blocks(llm) == 0


def test_a_pin_that_leaves_too_little_room_is_refused() -> None:
    """Sixteen blocks are what a sequence may need."""
    llm = make_llm(num_blocks=20)
    first = llm.session([1] * 20)
    first.pin()
    second = llm.session([2] * 40)
    with pytest.raises(
        ValueError, match="7 pinned blocks of 20 would leave fewer than the 16 that a sequence"
    ):
        second.pin()
    assert not second.is_pinned
    assert num_held_blocks(llm) == 2
    flood(llm, 3)
    assert cached_by(llm, [1] * 20) == 16
    first.unpin()
    with pytest.raises(ValueError, match="5 pinned blocks of 20"):
        second.pin()
    second.rollback(8)
    second.pin()
    assert num_held_blocks(llm) == 4


def test_one_that_fills_the_context_still_fits_beside_the_pins() -> None:
    llm = make_llm(num_blocks=20)
    llm.engine.scheduler.admission.horizon = 0  # who is admitted may have to leave again
    llm.session([1] * 32).pin()
    draw = random.Random(2)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(5)]
    own = params(100)
    outputs = llm.generate(prompts, own, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [expected(p, own) for p in prompts]
    assert llm.get_metrics().num_preemptions > 0
    assert cached_by(llm, [1] * 33) == 32


def test_without_prefix_caching_only_pins_are_refused() -> None:
    llm = make_llm(enable_prefix_caching=False)
    session = llm.session(list(range(20)))
    with pytest.raises(ValueError, match=r"pin .*needs enable_prefix_caching"):
        session.pin()
    assert not session.is_pinned
    session.unpin()
    output = session.generate(params(5))
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == expected(list(range(20)), params(5))
    session.close()


def test_a_closed_session_refuses() -> None:
    llm = make_llm()
    session = llm.session([1, 2, 3])
    session.pin()
    session.close()
    session.close()
    assert not session.is_pinned
    for use in (
        session.generate,
        session.pin,
        session.fork,
        lambda: session.append([1]),
        lambda: session.rollback(1),
        lambda: session.generate(params(), [1]),
        lambda: llm.generate_sessions([llm.session([1]), session], use_tqdm=False),
    ):
        with pytest.raises(ValueError, match="the session is closed"):
            use()
    assert session.token_ids == [1, 2, 3]
    assert not llm.engine.has_work


def test_a_batch_is_checked_before_any_work_begins() -> None:
    llm = make_llm()
    good, long = llm.session([1, 2]), llm.session([1])
    long.append([5] * 127)
    with pytest.raises(ValueError, match=r"session 1: .*at most 127 tokens.*got 128"):
        llm.generate_sessions([good, long], params(), use_tqdm=False)
    with pytest.raises(ValueError, match="comes twice; fork it"):
        llm.generate_sessions([good, good], params(), use_tqdm=False)
    for own in (params(n=2), params(n=1, best_of=2)):
        with pytest.raises(ValueError, match=r"session 0: .*n must be 1"):
            llm.generate_sessions([good], own, use_tqdm=False)
    with pytest.raises(ValueError, match="as many as the 2"):
        llm.generate_sessions([good, long], [params()], use_tqdm=False)
    assert good.token_ids == [1, 2]
    assert llm.get_metrics().num_steps == 0
    assert llm.generate_sessions([], use_tqdm=False) == []


def test_a_session_of_another_llm_is_refused() -> None:
    session = make_llm().session([1, 2])
    with pytest.raises(ValueError, match="session 0: the session belongs to another LLM"):
        make_llm().generate_sessions([session], params(), use_tqdm=False)
    assert session.token_ids == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([300], "got 300 at position 0"),
        ([1] * 128, "at most 127 tokens"),
        ("text", "skip_tokenizer_init"),
        ({"prompt_token_ids": [1], "cache_salt": 5}, "cache_salt must be a string"),
        (7, "a prompt must be"),
    ],
)
def test_a_session_begins_with_a_prompt(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm().session(prompt)


@pytest.mark.parametrize("num_tokens", [-1, 3, 4, 1.0, "1", None, True])
def test_no_further_back_than_its_first_token(num_tokens: Any) -> None:
    session = make_llm().session([1, 2, 3])
    with pytest.raises(ValueError, match=r"num_tokens must be in \[0, 2\]"):
        session.rollback(num_tokens)
    session.rollback(0)
    assert session.token_ids == [1, 2, 3]
    session.rollback(2)
    assert session.token_ids == [1]


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_a_fork_is_at_least_one(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        make_llm().session([1]).fork(n)


def test_sessions_of_salts_share_nothing() -> None:
    llm = make_llm()
    prompt = list(range(40))
    salted = llm.session({"prompt_token_ids": prompt, "cache_salt": "a"})
    salted.pin()
    assert cached_by(llm, prompt) == 0
    assert salted.generate(params(1)).num_cached_tokens == 32
    assert salted.fork()[0].generate(params(1)).num_cached_tokens == 40


def test_forms_of_what_is_appended() -> None:
    llm = make_llm(tokenizer=True)
    session = llm.session("a")
    session.append("b")
    session.append([99])
    session.append((100,))
    session.append({"prompt_token_ids": [101]})
    session.append({"prompt": "f"})
    assert session.text == "abcdef"
    for prompt in (5, None, {"text": "a"}, {"prompt": 5}):
        with pytest.raises(ValueError, match="a prompt must be"):
            session.append(prompt)  # type: ignore[arg-type]
    assert session.text == "abcdef"


def test_what_is_refused_leaves_a_session_as_it_was() -> None:
    llm = make_llm()
    session = llm.session([1, 2, 3])
    for prompt, message in (
        ([300], "token ids must"),
        ([5] * 127, "session 0: "),
        ([-5], "got -5"),
    ):
        with pytest.raises(ValueError, match=message):
            session.generate(params(), prompt)
        assert session.token_ids == [1, 2, 3]
    for appended in ([300], [-5], [1.5], [True]):
        with pytest.raises(ValueError, match=r"token ids must be integers in \[0, 300\), got "):
            session.append(appended)  # type: ignore[arg-type]
    session.append([])
    assert session.token_ids == [1, 2, 3]
    for sessions in (5, session, [session, 5], None):
        with pytest.raises(ValueError, match="sessions must be a list of sessions, got "):
            llm.generate_sessions(sessions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a SamplingParams, got \{'n': 1\}"):
        session.generate({"n": 1})  # type: ignore[arg-type]
    assert session.generate(params(2)).outputs[0].token_ids == expected([1, 2, 3], params(2))


def test_a_pinned_session_outgrows_its_pin() -> None:
    """What was generated is not lost where the room for it ends: it is pinned as far as before."""
    llm = make_llm(num_blocks=20)
    session, other = llm.session([1] * 20), llm.session([2] * 10)
    session.pin()
    outputs = llm.generate_sessions([session, other], params(30), use_tqdm=False)
    assert session.token_ids == [1] * 20 + outputs[0].outputs[0].token_ids
    assert other.token_ids == [2] * 10 + outputs[1].outputs[0].token_ids
    assert num_held_blocks(llm) == 2
    session.rollback(1)
    assert num_held_blocks(llm) == 2
    flood(llm, 3)
    assert cached_by(llm, session.token_ids) == 16
    session.rollback(20)
    assert session.generate(params(3)).num_cached_tokens >= 16
    assert num_held_blocks(llm) == 4
    session.close()
    assert num_held_blocks(llm) == 0


def test_a_salt_comes_with_the_beginning_alone() -> None:
    session = make_llm().session({"prompt_token_ids": [1, 2], "cache_salt": "a"})
    with pytest.raises(ValueError, match="keeps the cache_salt that it began with"):
        session.append({"prompt_token_ids": [3], "cache_salt": "b"})
    assert session.token_ids == [1, 2]
