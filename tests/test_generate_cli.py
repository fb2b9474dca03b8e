"""The command line, with a runner that needs no model."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import fields
from typing import Any

import pytest

from nano_vllm import generate
from nano_vllm.cli import ArgumentParser, add_engine_arguments, engine_options, run_command
from nano_vllm.config import EngineConfig
from nano_vllm.engine.llm import LLM
from tests.engine.fake_runner import EOS, FakeRunner, make_engine, make_tokenizer

HI = [ord("H"), ord("i"), EOS]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a fake engine behind LLM; the options it was loaded with."""
    seen: dict[str, Any] = {}

    def load(use_tqdm_on_load: bool, **options: Any) -> LLM:
        seen.update(options)
        script = {(str(request), 0): HI for request in range(5)}
        runner = FakeRunner(script=script, failing=seen.get("failing", ()))
        return LLM.from_engine(make_engine(runner, make_tokenizer()))

    monkeypatch.setattr("nano_vllm.engine.llm.LLM", load)
    return seen


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    try:
        code = generate.main(list(argv))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.mark.usefixtures("loaded")
def test_a_prompt_is_answered_and_the_figures_come_last(capsys: Any) -> None:
    code, out, err = run(capsys, "--prompt", "abc", "--temperature", "0")
    assert (code, out) == (0, "Hi\n")
    assert len(err) == 1
    assert err[0].startswith("3 prompt tokens, 3 output tokens, ")
    assert "tok/s, time to first token 3.000 s" in err[0]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_several_prompts_have_headings(capsys: Any, stream: list[str]) -> None:
    code, out, _ = run(capsys, "--prompt", "abc", "--prompt", "d", *stream)
    assert (code, out) == (0, "--- abc\nHi\n--- d\nHi\n")


@pytest.mark.usefixtures("loaded")
def test_json(capsys: Any) -> None:
    code, out, _ = run(capsys, "--prompt", "abc", "--prompt", "é", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "prompt": prompt,
            "text": "Hi",
            "token_ids": HI,
            "finish_reason": "stop",
            "num_cached_tokens": 0,
        }
        for prompt in ("abc", "é")
    ]


@pytest.mark.usefixtures("loaded")
def test_stop_and_max_tokens(capsys: Any) -> None:
    assert run(capsys, "--prompt", "a", "--stop", "x", "--stop", "i")[1] == "H\n"
    assert run(capsys, "--prompt", "a", "--max-tokens", "1")[1] == "H\n"


@pytest.mark.usefixtures("loaded")
def test_a_prompt_from_standard_input(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    code, out, _ = run(capsys, "--prompt", "-", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "abc"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_bad_prompt_does_not_harm_the_good_ones(capsys: Any, chat: list[str]) -> None:
    code, out, err = run(capsys, "--prompt", "", "--prompt", "abc", *chat)
    assert code == 2
    assert err[0] == "error: prompt 0: the prompt must not be empty, got ''"
    if chat:  # the fake model has no template
        assert err[1].startswith("error: prompt 1: ")
    else:
        assert out == "--- abc\nHi\n"
        assert err[1].startswith("3 prompt tokens")


def test_a_failing_request_is_reported(capsys: Any, loaded: dict[str, Any]) -> None:
    loaded["failing"] = {"0"}
    code, out, err = run(capsys, "--prompt", "abc", "--prompt", "d")
    assert code == 1
    assert out == "--- abc\n\n--- d\nHi\n"
    assert err[-1] == "error: prompt 'abc': not finite"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], 'no prompt: give --prompt "..."'),
        (["--prompt", "a", "--temprature", "1"], "'--temprature'; did you mean --temperature?"),
        (["--prompt", "a", "--max-num-seq=3"], "'--max-num-seq'; did you mean --max-num-seqs?"),
        (["--prompt", "a", "--qqq"], "'--qqq'; --help lists what is known"),
        (["--prompt", "a", "b"], "unknown option 'b'"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens must be an integer of at least 1"),
        (["--prompt", "a", "--max-tokens", "x"], "--max-tokens: invalid int value: 'x'"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be a finite number"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be a finite number in (0, 1], got 0.0"),
        (["--prompt", "a", "--stop", ""], "stop must hold non-empty strings"),
        (["--prompt", "a", "--block-size", "12"], "block_size must be a multiple of 8"),
        (["--prompt", "a", "--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["--prompt", "a", "--stream", "--json"], "cannot be combined"),
    ],
)
def test_bad_usage_is_one_line(capsys: Any, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ")
    assert message in err[0]


def test_a_failure_is_one_line_unless_debug(capsys: Any) -> None:
    argv = ["--prompt", "a", "--device", "cpu", "--model", "/no/such/model"]
    code, out, err = run(capsys, *argv)
    assert (code, out, len(err)) == (1, "", 1)
    assert err[0].startswith("error: model '/no/such/model' does not exist")
    with pytest.raises(ValueError, match="does not exist"):
        generate.main([*argv, "--debug"])


def test_errors_of_any_kind_are_one_line(capsys: Any) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert run_command(lambda: fail(RuntimeError("two\nlines")), debug=False) == 1
    assert run_command(lambda: fail(KeyboardInterrupt()), debug=False) == 130
    assert run_command(lambda: 7, debug=False) == 7
    assert capsys.readouterr().err == "error: RuntimeError: two lines\ninterrupted\n"


def test_every_option_is_a_flag(capsys: Any, loaded: dict[str, Any]) -> None:
    values = {
        "str": ("x", "x"),
        "int": ("16", 16),
        "float": ("0.5", 0.5),
    }
    chosen = {
        "device": "cpu",
        "dtype": "float32",
        "load_format": "dummy",
        "quantization": "gguf",
        "kv_cache_dtype": "fp8",
        "scheduling_policy": "priority",
    }
    argv, expected = [], {}
    for field in fields(EngineConfig):
        flag = "--" + field.name.replace("_", "-")
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            argv.append(flag.replace("--", "--no-") if field.default else flag)
            expected[field.name] = not field.default
        elif field.name not in chosen:
            text, expected[field.name] = values[kind]
            argv += [flag, text]
    expected |= chosen
    for name, value in chosen.items():
        argv += ["--" + name.replace("_", "-"), value]
    argv += ["--itl-slo", "0"]  # any other needs chunked prefill
    expected["itl_slo"] = 0.0
    assert run(capsys, "--prompt", "a", *argv)[0] == 0
    assert loaded == expected


def test_defaults_are_those_of_the_dataclass() -> None:
    parser = ArgumentParser()
    add_engine_arguments(parser)
    assert EngineConfig(**engine_options(parser.parse_args([]))) == EngineConfig()


def test_help_explains_every_flag(capsys: Any) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for field in fields(EngineConfig):
        assert "--" + field.name.replace("_", "-") in out
    assert "Tokens per block" in out


def test_public_names() -> None:
    import nano_vllm

    for name in nano_vllm.__all__:
        assert getattr(nano_vllm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = nano_vllm.LLMs
