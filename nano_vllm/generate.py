"""Generate text from the command line: python -m nano_vllm.generate --prompt "..."."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from typing import TYPE_CHECKING

from nano_vllm.cli import (
    FAILURE,
    USAGE_ERROR,
    ArgumentParser,
    add_engine_arguments,
    add_field_arguments,
    engine_options,
    print_error,
    run_command,
)
from nano_vllm.config import EngineConfig
from nano_vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nano_vllm.engine.llm import LLM
    from nano_vllm.engine.request import Request
    from nano_vllm.outputs import RequestOutput

DEFAULT_MAX_TOKENS = 256
SAMPLING_FLAGS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 2 for bad usage or a bad prompt, or 1 if the work failed."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        params = SamplingParams(
            stop=args.stop, **{name: getattr(args, name) for name in SAMPLING_FLAGS}
        )
        EngineConfig.from_options(engine_options(args))
    except ValueError as error:
        parser.error(str(error))
    if not args.prompt:
        parser.error(
            'no prompt: give --prompt "..." (repeatable), or --prompt - for standard input'
        )
    if args.stream and args.json:
        parser.error("--stream and --json cannot be combined: --json prints whole results")
    return run_command(lambda: _load_and_generate(args, params), args.debug)


def generate(llm: LLM, args: argparse.Namespace, params: SamplingParams) -> int:
    """Answer the prompts; those that cannot be served are reported, the others answered."""
    exit_code = 0
    prompts, requests = [], []
    for index, prompt in enumerate(args.prompt):
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        try:
            requests.append(_make_request(llm, text, args, params))
            prompts.append(text)
        except ValueError as error:
            if args.debug:
                raise
            print_error(f"prompt {index}: {error}")
            exit_code = USAGE_ERROR
    if not requests:
        return exit_code
    headings = [f"--- {prompt}\n" if len(args.prompt) > 1 else "" for prompt in prompts]
    start = time.monotonic()
    if args.stream:
        outputs = _print_stream(llm, requests, headings)
    else:
        outputs = llm.run(requests, use_tqdm=len(requests) > 1 and sys.stderr.isatty())
    seconds = time.monotonic() - start
    for prompt, heading, output in zip(prompts, headings, outputs, strict=True):
        if args.json:
            print(_as_json(prompt, output))
        elif not args.stream:
            print(heading + output.outputs[0].text)
    _print_summary(outputs, seconds)
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.outputs[0].finish_reason == "abort":
            print_error(f"prompt {prompt!r}: {output.outputs[0].stop_reason}")
            exit_code = exit_code or FAILURE
    return exit_code


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m nano_vllm.generate", description="Complete prompts, or answer them."
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; - reads standard input"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message in a chat of its own"
    )
    parser.add_argument("--stream", action="store_true", help="print the text as it grows")
    parser.add_argument("--json", action="store_true", help="print one JSON object per result")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sampling = parser.add_argument_group("sampling")
    add_field_arguments(sampling, SamplingParams, SAMPLING_FLAGS, max_tokens=DEFAULT_MAX_TOKENS)
    sampling.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="repeatable; a string that ends the text when it appears in it",
    )
    add_engine_arguments(parser)
    return parser


def _load_and_generate(args: argparse.Namespace, params: SamplingParams) -> int:
    from nano_vllm.engine.llm import LLM

    _import_runner()
    with LLM(use_tqdm_on_load=sys.stderr.isatty(), **engine_options(args)) as llm:
        return generate(llm, args, params)


def _import_runner() -> None:
    """Import what takes seconds, torch above all.

    Imports may swallow a KeyboardInterrupt: meanwhile Ctrl-C ends the process by the signal itself.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import nano_vllm.runner.model_runner  # noqa: F401
    finally:
        signal.signal(signal.SIGINT, handler)


def _make_request(llm: LLM, text: str, args: argparse.Namespace, params: SamplingParams) -> Request:
    if not args.chat:
        return llm.make_request(text, params, stream=args.stream)
    if not text:
        raise ValueError("the prompt must not be empty, got ''")
    messages = [{"role": "user", "content": text}]
    return llm.make_chat_request(messages, params, stream=args.stream)


def _print_stream(llm: LLM, requests: list[Request], headings: list[str]) -> list[RequestOutput]:
    """Print each text as it grows, one after the other; all of them are worked on at once."""
    latest: dict[str, RequestOutput] = {}
    current, pending, num_printed = 0, headings[0], 0
    for output in llm.stream(requests):
        latest[output.request_id] = output
        while current < len(requests) and requests[current].request_id in latest:
            shown = latest[requests[current].request_id]
            text = shown.outputs[0].text
            print(pending + text[num_printed:], end="", flush=True)
            pending, num_printed = "", len(text)
            if not shown.finished:
                break
            print()
            current, num_printed = current + 1, 0
            pending = headings[current] if current < len(headings) else ""
    return [latest[request.request_id] for request in requests]


def _as_json(prompt: str, output: RequestOutput) -> str:
    completion = output.outputs[0]
    return json.dumps(
        {
            "prompt": prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "num_cached_tokens": output.num_cached_tokens,
        },
        ensure_ascii=False,
    )


def _print_summary(outputs: list[RequestOutput], seconds: float) -> None:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    waits = [
        output.metrics.first_token_time - output.metrics.arrival_time
        for output in outputs
        if output.metrics.first_token_time is not None
    ]
    first = f"{sum(waits) / len(waits):.3f} s" if waits else "none"
    print(
        f"{num_prompt} prompt tokens, {num_output} output tokens, "
        f"{num_output / seconds:.1f} tok/s, time to first token {first}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
