"""Beam search equals that of transformers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from nano_vllm import BeamSearchParams
from nano_vllm.check import randomize
from nano_vllm.sampling.beam_search import BeamSearch

VOCAB_SIZE = 40
NAN = math.nan
INF = math.inf


class Float64Torch:
    """torch for transformers' beam search, which asks for float32: some of its comparisons would
    hang on the last bit.
    """

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _oracle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In float64, and on one thread: on a busy machine tiny tensors wait long for a second one."""
    monkeypatch.setattr(transformers.generation.utils, "torch", Float64Torch())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass
class Setting:
    params: BeamSearchParams
    end_token_ids: list[int]
    end_bias: float
    """Added to the logits of end tokens: the more, the shorter are hypotheses."""
    prompt: list[int]


def random_setting(draw: random.Random, beam_width: int, early_stopping: bool | str) -> Setting:
    params = BeamSearchParams(
        beam_width=beam_width,
        max_tokens=draw.choice([1, 2, 4, 7, 11, 16]),
        length_penalty=draw.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        early_stopping=early_stopping,
        n=draw.choice([None, *range(1, beam_width + 1)]),
    )
    ends = draw.sample(range(3, VOCAB_SIZE), draw.choice([0, 1, 1, 1, 2, 2, 3]))
    prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 8))]
    return Setting(params, ends, draw.uniform(0.0, 4.0), prompt)


def make_model(seed: int) -> Any:
    """A Llama whose head has a bias."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE)
    return randomize(model, seed).double()


def bias_ends(model: Any, setting: Setting) -> None:
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[setting.end_token_ids] = setting.end_bias


@torch.inference_mode()
def search(model: Any, setting: Setting) -> BeamSearch:
    """All tokens of all beams through the model at each step."""
    params = setting.params
    beams = BeamSearch(params, frozenset(setting.end_token_ids), params.max_tokens)
    sequences = [setting.prompt]
    while sequences:
        assert beams.num_live == len(sequences)
        logprobs = model(torch.tensor(sequences)).logits[:, -1].log_softmax(dim=-1)
        top = logprobs.topk(min(beams.num_candidates, VOCAB_SIZE))
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        steps = beams.advance([list(zip(ids, values, strict=True)) for ids, values in rows])
        sequences = [[*sequences[step.parent], step.token_id] for step in steps]
    assert beams.num_live == 0
    return beams


def generate(model: Any, setting: Setting, **options: Any) -> Any:
    return model.generate(
        torch.tensor([setting.prompt]),
        attention_mask=torch.ones(1, len(setting.prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=setting.params.max_tokens,
        eos_token_id=setting.end_token_ids or None,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("beam_width", range(2, 7))
def test_equals_transformers(beam_width: int, early_stopping: bool | str, seed: int) -> None:
    """Tokens, scores and order."""
    draw = random.Random(seed)
    model = make_model(draw.getrandbits(31))
    for _ in range(14):
        setting = random_setting(draw, beam_width, early_stopping)
        params = setting.params
        bias_ends(model, setting)
        expected = generate(
            model,
            setting,
            num_beams=beam_width,
            num_return_sequences=params.n or beam_width,
            length_penalty=params.length_penalty,
            early_stopping=early_stopping,
        )
        lengths = (expected.beam_indices >= 0).sum(dim=-1).tolist()
        outputs = expected.sequences[:, len(setting.prompt) :].tolist()
        found = search(model, setting).hypotheses(params.n)
        assert [h.token_ids for h in found] == [
            output[:length] for output, length in zip(outputs, lengths, strict=True)
        ], setting
        scores = expected.sequences_scores.tolist()
        assert [h.score for h in found] == pytest.approx(scores, rel=1e-9), setting
        for h in found:
            stopped = h.token_ids[-1] in setting.end_token_ids
            assert h.finish_reason == ("stop" if stopped else "length")
            penalty = len(h.token_ids) ** params.length_penalty
            assert h.score == pytest.approx(h.cumulative_logprob / penalty)


def test_the_settings_are_no_easy_ones(seed: int) -> None:
    """Hypotheses end at different lengths, for both reasons, and searches before their time."""
    draw = random.Random(seed)
    model = make_model(draw.getrandbits(31))
    lengths = reasons = early = 0
    for _ in range(40):
        setting = random_setting(draw, draw.randint(2, 6), draw.choice([True, False, "never"]))
        bias_ends(model, setting)
        beams = search(model, setting)
        lengths += len({len(h.token_ids) for h in beams.hypotheses()}) > 1
        reasons += len({h.finish_reason for h in beams.hypotheses()}) > 1
        early += beams.num_tokens < setting.params.max_tokens
    print(lengths, reasons, early)
    assert min(lengths, reasons, early) >= 3


def test_one_beam_is_greedy_search(seed: int) -> None:
    draw = random.Random(seed)
    model = make_model(draw.getrandbits(31))
    for _ in range(24):
        setting = random_setting(draw, 1, draw.choice([True, False, "never"]))
        bias_ends(model, setting)
        expected = generate(model, setting, num_beams=1)
        (found,) = search(model, setting).hypotheses()
        assert found.token_ids == expected.sequences[0, len(setting.prompt) :].tolist(), setting
        raw = model.compute_transition_scores(expected.sequences, expected.scores, None, True)
        assert found.cumulative_logprob == pytest.approx(float(raw.sum())), setting


END = 9


def start(beam_width: int = 2, max_tokens: int = 5, **params: Any) -> BeamSearch:
    params = {"length_penalty": 0.0} | params
    search_params = BeamSearchParams(beam_width=beam_width, max_tokens=max_tokens, **params)
    return BeamSearch(search_params, frozenset({END}), max_tokens)


def test_an_end_below_the_first_beams_is_no_hypothesis() -> None:
    beams = start()
    assert beams.advance([[(1, -1.0), (2, -2.0), (END, -3.0), (4, -4.0)]]) == [(0, 1), (0, 2)]
    assert beams.hypotheses() == []


def test_a_beam_can_be_dropped() -> None:
    beams = start(max_tokens=3)
    beams.advance([[(1, -1.0), (2, -2.0), (3, -3.0), (4, -4.0)]])
    assert beams.advance([[], [(5, -0.5)]]) == [(1, 5)]
    assert beams.num_live == 1
    assert beams.advance([[(6, -0.5), (END, -0.75), (7, -1.0)]]) == []
    found = [(h.token_ids, h.score, h.finish_reason) for h in beams.hypotheses()]
    assert found == [([2, 5, 6], -3.0, "length"), ([2, 5, END], -3.25, "stop")]
    assert [h.token_ids for h in beams.hypotheses(1)] == [[2, 5, 6]]


def test_when_all_beams_are_dropped_the_search_is_over() -> None:
    """What ended before stays."""
    beams = start()
    assert beams.advance([[(END, -1.0), (2, -2.0), (3, -3.0), (4, -4.0)]]) == [(0, 2), (0, 3)]
    assert beams.advance([[], []]) == []
    assert beams.num_live == 0
    assert [h.token_ids for h in beams.hypotheses()] == [[END]]
    assert start().advance([[]]) == []


def test_what_cannot_be_is_no_candidate() -> None:
    """A masked token must not fill up the beams."""
    beams = start(beam_width=3)
    assert beams.advance([[(1, -1.0), (2, NAN), (3, -INF), (4, -INF)]]) == [(0, 1)]


def test_equals_rank_by_beam() -> None:
    beams = start()
    assert beams.advance([[(3, -1.0), (2, -1.0), (1, -1.0)]]) == [(0, 3), (0, 2)]
    same = [(5, -1.0), (4, -1.0)]
    assert beams.advance([same, same]) == [(0, 5), (0, 4)]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "max_tokens", "logprob", "goes_on"),
    [
        (True, 1.0, 100, -2.9, False),
        (False, 1.0, 100, -2.9, True),  # -1.45 is better than -1.5
        (False, 1.0, 100, -3.0, False),
        ("never", 1.0, 3, -4.5, False),  # -4.5 / 3 is no better than -1.5
        ("never", 1.0, 4, -4.5, True),
        ("never", 0.0, 100, -2.9, True),  # better than -3
        ("never", 0.0, 100, -3.0, False),
        ("never", -1.0, 100, -2.9, True),  # -2.9 * 2 is better than -6, -2.9 * 100 is not
        ("never", -1.0, 100, -3.0, False),
    ],
)
def test_stops_where_nothing_better_can_come(
    early_stopping: bool | str,
    length_penalty: float,
    max_tokens: int,
    logprob: float,
    goes_on: bool,
) -> None:
    """Hypotheses of one token, at -1, and of two, at -3; the likeliest beam of two at logprob."""
    beams = start(
        max_tokens=max_tokens, early_stopping=early_stopping, length_penalty=length_penalty
    )
    beams.advance([[(END, -1.0), (1, -2.0), (2, -5.0), (3, -9.0)]])
    likely = sorted([(END, -1.0), (4, logprob + 2.0)], key=lambda candidate: -candidate[1])
    steps = beams.advance([[*likely, (5, -9.0), (6, -9.0)], [(7, -3.0), (8, -4.0)]])
    assert [h.cumulative_logprob for h in beams.hypotheses()] in ([-1.0, -3.0], [-3.0, -1.0])
    assert steps == ([(0, 4), (1, 7)] if goes_on else [])


def test_ends_do_not_crowd_out_beams() -> None:
    """Twice beam_width candidates would be ends alone."""
    params = BeamSearchParams(2, 5, length_penalty=2.0, early_stopping="never")
    beams = BeamSearch(params, frozenset({7, 8, 9}), 5)
    assert beams.num_candidates == 8
    likely = [(7, -1.0), (8, -2.0), (9, -3.0), (1, -4.0), (2, -5.0)]
    beams.advance([[(1, -0.5), (2, -0.75), *likely[:3]]])
    assert beams.advance([likely, likely[:3]]) == [(0, 1), (0, 2)]


def test_fewer_tokens_where_the_context_ends() -> None:
    params = BeamSearchParams(beam_width=1, max_tokens=100)
    beams = BeamSearch(params, frozenset(), 1)
    assert beams.num_candidates == 2
    assert beams.advance([[(1, -1.0), (2, -2.0)]]) == []
    assert [(h.token_ids, h.finish_reason) for h in beams.hypotheses()] == [([1], "length")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, r"beam_width must be an integer in \[1, 1024\], got 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be an integer of at least 1, got None"),
        ({"temperature": 0.7}, "temperature must be 0 in a beam search, .* got 0.7"),
        ({"temperature": NAN}, "temperature must be 0 in a beam search, .* got nan"),
        (
            {"length_penalty": INF},
            r"length_penalty must be a finite number in \[-10, 10\], got inf",
        ),
        (
            {"early_stopping": "always"},
            "early_stopping must be True, False or 'never', got 'always'",
        ),
        ({"early_stopping": 1}, "early_stopping must be True, False or 'never', got 1"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"n": 5}, "n must be at most beam_width = 4, got 5"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be an integer of at least 0, got -1"),
    ],
)
def test_params_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8} | options))
