from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nano_vllm
from nano_vllm.engine.llm import LLM
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import EOS, FakeRunner, make_engine, make_tokenizer, reference_tokens
from tests.models.checkpoints import make_checkpoint

PARAMS = SamplingParams(seed=1, max_tokens=6)


def make_llm(with_tokenizer: bool = True, chat_template: str | None = None) -> LLM:
    runner = FakeRunner(max_model_len=64)
    tokenizer = make_tokenizer(chat_template=chat_template) if with_tokenizer else None
    return LLM.from_engine(make_engine(runner, tokenizer))


def generate(llm: LLM, prompts: Any, params: Any = PARAMS) -> list[nano_vllm.RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "token_ids"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        ((97, 98), [[97, 98]]),
        ({"prompt": "ab"}, [[97, 98]]),
        ({"prompt_token_ids": [97, 98]}, [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["a", [98], {"prompt": "c"}, {"prompt_token_ids": [100]}], [[97], [98], [99], [100]]),
        ([], []),
    ],
)
def test_forms_of_prompts(prompts: Any, token_ids: list[list[int]]) -> None:
    outputs = generate(make_llm(), prompts)
    assert [output.prompt_token_ids for output in outputs] == token_ids
    for output in outputs:
        assert output.outputs[0].token_ids == reference_tokens(
            output.prompt_token_ids, PARAMS, 0, 64
        )


def test_the_text_of_a_prompt_is_kept() -> None:
    outputs = generate(make_llm(), ["ab", {"prompt": "c"}, [100]])
    assert [output.prompt for output in outputs] == ["ab", "c", None]


def test_results_come_in_the_order_of_the_prompts() -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    outputs = generate(make_llm(), ["a", "b", "c"], params)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", ""], "prompt 1: .*must not be empty, got ''"),
        ([[1], []], "prompt 1: .*at least one token"),
        (["a", "b", [1, 2, 300]], "prompt 2: .*got 300 at position 2"),
        (["a" * 64], "prompt 0: .*at most 63 tokens.*got 64"),
        (["a", 5], "prompt 1: a prompt must be a string, .*got 5"),
        ([None], "prompt 0: .*got None"),
        (None, "prompt 0: .*got None"),
        ([{"text": "a"}], "prompt 0: .*got {'text': 'a'}"),
        ([{"prompt": "a", "prompt_token_ids": [1]}], "prompt 0: a prompt must be"),
        ([{"prompt": [1]}], "prompt 0: a prompt must be"),
        ([[True]], "prompt 0: .*got True"),
        (["\ud800"], "prompt 0: .*lone surrogate"),
    ],
)
def test_a_bad_prompt_is_named_and_nothing_is_queued(prompts: Any, message: str) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=message):
        generate(llm, prompts)
    assert not llm.engine.has_work
    assert llm.get_metrics().num_steps == 0
    assert len(generate(llm, "a")) == 1


def test_parameters_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="as many as the 2 prompts, got 1"):
        generate(make_llm(), ["a", "b"], [PARAMS])
    with pytest.raises(ValueError, match="prompt 1: allowed_token_ids"):
        generate(make_llm(), ["a", "b"], [PARAMS, SamplingParams(allowed_token_ids=[300])])


def test_text_needs_a_tokenizer() -> None:
    llm = make_llm(with_tokenizer=False)
    with pytest.raises(ValueError, match=r"prompt 0: .*skip_tokenizer_init.*got 'a'"):
        generate(llm, "a")
    assert generate(llm, [1, 2])[0].outputs[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.get_tokenizer()


def test_draws_do_not_depend_on_requests_that_were_refused() -> None:
    def seq_ids(llm: LLM) -> list[int]:
        runner = llm.engine.runner
        generate(llm, ["a", "b"])
        return [s.sequence.seq_id for s in runner.batches[-1].scheduled]  # type: ignore[attr-defined]

    refused = make_llm()
    with pytest.raises(ValueError, match="prompt 1"):
        generate(refused, ["a", ""])
    assert seq_ids(refused) == seq_ids(make_llm())


def test_what_breaks_off_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    launch = llm.engine.runner.launch

    def interrupted(batch: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, ["a", "b"])
    assert not llm.engine.has_work
    assert llm.get_metrics().num_free_blocks == 64
    monkeypatch.setattr(llm.engine.runner, "launch", launch)
    assert generate(llm, [97])[0].outputs[0].token_ids == reference_tokens([97], PARAMS, 0, 64)


def test_a_stream_that_is_given_up_leaves_nothing_behind() -> None:
    llm = make_llm()
    stream = llm.stream([llm.make_request("a", PARAMS, stream=True)])
    assert len(next(stream).outputs[0].token_ids) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work


def test_streams_take_turns() -> None:
    """Whoever makes the steps, each gets what is its own, and all of it."""
    llm = make_llm()
    params = [SamplingParams(seed=1, max_tokens=n, ignore_eos=True) for n in (3, 9, 5)]
    streams = [
        llm.stream([llm.make_request([place], own, stream=True) for place in (1, 2)])
        for own in params
    ]
    lengths: list[dict[str, list[int]]] = [{} for _ in streams]
    open_ones = list(zip(streams, lengths, strict=True))
    while open_ones:
        for stream, mine in list(open_ones):
            output = next(stream, None)
            if output is None:
                open_ones.remove((stream, mine))
            else:
                length = len(output.outputs[0].token_ids)
                mine.setdefault(output.request_id, []).append(length)
        generate(llm, [[3]])
    for mine, own in zip(lengths, params, strict=True):
        assert list(mine.values()) == [list(range(1, (own.max_tokens or 0) + 1))] * 2
    assert not llm.engine.has_work


def test_a_stream_that_is_given_up_is_not_reported_to_others() -> None:
    llm = make_llm()
    long = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    given_up = llm.stream([llm.make_request([1], long, stream=True)])
    next(given_up)
    (output,) = generate(llm, [[2]])
    assert output.outputs[0].token_ids == reference_tokens([2], PARAMS, 0, 64)
    given_up.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert (llm._untaken, llm._streamed) == ([], set())


def test_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match=r"conversation 0: .*no chat template"):
        make_llm().chat([{"role": "user", "content": "Hi"}], use_tqdm=False)


HI = {"role": "user", "content": "Hi"}


def chat(llm: LLM, messages: Any, **options: Any) -> list[nano_vllm.RequestOutput]:
    return llm.chat(messages, PARAMS, use_tqdm=False, **options)


@pytest.mark.parametrize("wrong", [5, [], [5], "Hi"])
def test_conversations_are_checked(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"conversation 1: .* must be "):
        chat(make_llm(chat_template="a"), [[HI], wrong])


def test_chat_renders_the_template() -> None:
    llm = make_llm(chat_template="<{{ messages[0].content }}>")
    outputs = chat(llm, [HI]) + chat(llm, [[HI], [HI]])
    assert [output.prompt for output in outputs] == ["<Hi>"] * 3


def test_chat_hands_on_what_templates_take() -> None:
    llm = make_llm(
        chat_template="{{ messages[0].content }}{{ add_generation_prompt }}"
        "{{ tools[0].f }}{{ documents[0].d }}{{ thinking }}"
    )
    own = {"tools": [{"f": "F"}], "documents": [{"d": "D"}]}
    (output,) = chat(llm, [HI], chat_template_kwargs={"thinking": 1}, **own)
    assert output.prompt == "HiTrueFD1"
    outputs = chat(
        llm, [[HI], [HI]], add_generation_prompt=False, continue_final_message=True, **own
    )
    assert [output.prompt for output in outputs] == ["Hi", "Hi"]
    for messages in (5, None, "hi"):
        with pytest.raises(ValueError, match="messages must be a list, got "):
            chat(llm, messages)
    with pytest.raises(ValueError, match="conversation 0: chat_template_kwargs must be a mapping"):
        chat(llm, [HI], chat_template_kwargs=5)
    with pytest.raises(ValueError, match="conversation 0: chat_template_kwargs must not set tools"):
        chat(llm, [HI], chat_template_kwargs={"tools": []})


def test_messages_make_special_tokens_where_that_is_asked_for_alone() -> None:
    llm = make_llm(chat_template="{{ messages[0].content }}<eos>")
    message = {"role": "user", "content": "a<eos>"}
    (output,) = chat(llm, [message])
    assert output.prompt == "a<eos><eos>"
    assert output.prompt_token_ids == [*b"a<eos>", EOS]
    (output,) = chat(llm, [message], parse_special=True)
    assert output.prompt_token_ids == [97, EOS, EOS]


def test_leaving_the_context_closes_the_engine() -> None:
    with make_llm() as llm:
        runner = llm.engine.runner
    assert runner.is_closed  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="closed"):
        generate(llm, "a")


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM("model", max_num_seq=3)


def test_a_missing_tokenizer_is_told_before_the_weights_are_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=1)
    for weights in tmp_path.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        LLM(str(tmp_path), device="cpu")
