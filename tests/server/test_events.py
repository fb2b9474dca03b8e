"""What a stream sends: filled templates are what encoding each chunk would have given."""

from __future__ import annotations

import pytest

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.server.answer import Answer
from nano_vllm.server.chat import ChatAnswer
from nano_vllm.server.completions import CompletionAnswer
from nano_vllm.server.event import event
from nano_vllm.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from nano_vllm.server.validation import GatedPrompt

TEXTS = ["a", ' "b" ', "\\n\n\0", "é\N{ROCKET}\u2028", "", "</script>", "data: [DONE]\n\n", "z"]


def answer(kind: str, **fields: object) -> Answer:
    prompts = [GatedPrompt("é", [1, 2], SamplingParams(n=2), 16) for _ in range(2)]
    made: Answer
    if kind == "chat":
        made = ChatAnswer(ChatRequest(messages=[], **fields), prompts[0], 'a "model"')  # type: ignore[arg-type]
    else:
        made = CompletionAnswer(CompletionRequest(prompt="é", **fields), prompts, "m", None)  # type: ignore[arg-type]
    made.id, made.created = "id", 5
    return made


@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"return_token_ids": True}, {"stream_options": StreamOptions(include_usage=True)}],
)
def test_templates_change_nothing(kind: str, fields: dict[str, object]) -> None:
    quick, plain = answer(kind, **fields), answer(kind, **fields)
    if kind == "completions":
        quick.request.echo = plain.request.echo = True  # type: ignore[attr-defined]
    for place in range(len(quick.prompts)):
        for number, text in enumerate(TEXTS):
            reason = "length" if number == len(TEXTS) - 1 else None
            completions = [CompletionDelta(i, text, [number], None, reason) for i in (1, 0)]
            delta = RequestDelta("", completions, reason is not None)
            chunks = [c for part in completions for c in plain.chunks(place, part, None)]
            assert quick.events(place, delta) == b"".join(map(event, chunks))
