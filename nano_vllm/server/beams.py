"""Beam searches, by vLLM's names: what a client may ask of one."""

from __future__ import annotations

import json
from typing import Any

from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.server.errors import invalid
from nano_vllm.server.protocol import SamplingRequest

SWITCH = "use_beam_search"
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "stop": ([],),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_logprobs": (),
}
"""Fields that a search, which draws nothing and ranks by the raw logits, does not look at, with the
values that ask for nothing. vLLM ignores them; here any other value is refused.
"""


def beam_search_params(
    request: SamplingRequest, params: SamplingParams, max_num_seqs: int
) -> BeamSearchParams | None:
    """How to search; None where the request does not ask for that.

    Raises ApiError, naming the field, for what a search cannot do, and for its options without it.

    Args:
        request: what was asked.
        params: what the gate made of it: n beams are followed, and all of them returned.
        max_num_seqs: beams that there may be.
    """
    if not request.use_beam_search:
        if request.length_penalty not in (None, 1):
            raise invalid(f"length_penalty needs {SWITCH}: true", "length_penalty")
        if request.early_stopping:
            raise invalid(f"early_stopping needs {SWITCH}: true", "early_stopping")
        return None
    if request.stream:
        raise invalid(f"{SWITCH} cannot be streamed: beams are known at their end alone", SWITCH)
    if params.logprobs is not None:
        raise invalid(f"logprobs cannot be had with {SWITCH}", "logprobs")
    if params.best_of not in (None, params.n):
        raise invalid(
            f"best_of must be n = {params.n}, the number of beams, with {SWITCH}, "
            f"got {params.best_of}",
            "best_of",
        )
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            allowed = " or ".join(["absent", *map(json.dumps, neutral)])
            raise invalid(f"{name} must be {allowed} with {SWITCH}, got {value!r:.100}", name)
    if params.n > max_num_seqs:
        raise invalid(
            f"n, the number of beams, must be at most max_num_seqs = {max_num_seqs} with "
            f"{SWITCH}, got {params.n}",
            "n",
        )
    assert params.max_tokens is not None, "the gate knows the context"
    return BeamSearchParams(
        beam_width=params.n,
        max_tokens=params.max_tokens,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        early_stopping=request.early_stopping or False,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
    )
