"""LLM.beam_search finds what generate(num_beams=...) of transformers does, whatever runs beside."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nano_vllm.engine.llm import LLM
from nano_vllm.outputs import CompletionOutput, RequestOutput
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.fake_runner import FakeRunner, check_invariants, make_engine
from tests.engine.tiny_model import draw_prompt, make_llm
from tests.models.checkpoints import SETTINGS, make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("grouped queries", "mistral, sliding window", "gpt2")
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)


@dataclass
class Search:
    prompt: list[int]
    params: BeamSearchParams
    expected: list[tuple[list[int], float]]
    """Tokens and scores, best first."""


@dataclass
class Model:
    path: Path
    oracle: Any
    searches: list[Search]
    others: list[tuple[list[int], list[int]]]
    """Prompts of ordinary requests and their greedy tokens."""


@torch.inference_mode()
def expected_beams(
    oracle: Any, prompt: list[int], params: BeamSearchParams
) -> list[tuple[list[int], float]]:
    found = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=params.max_tokens,
        eos_token_id=params.stop_token_ids or None,
        pad_token_id=0,
        num_beams=params.beam_width,
        num_return_sequences=params.n or params.beam_width,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    lengths = (found.beam_indices >= 0).sum(dim=-1).tolist()
    rows = found.sequences[:, len(prompt) :].tolist()
    scores = found.sequences_scores.tolist()
    return [(row[:n], s) for row, n, s in zip(rows, lengths, scores, strict=True)]


@torch.inference_mode()
def greedy_tokens(oracle: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def draw_search(draw: random.Random, oracle: Any) -> Search:
    """One whose end tokens are among those that a search without them comes upon."""
    width = draw.choice([2, 3, 4, 6])
    prompt = draw_prompt(draw, draw.choice([1, 7, 8, 9, 20, 33]))
    options: dict[str, Any] = {"beam_width": width, "max_tokens": draw.choice([1, 6, 12, 12])}
    free = expected_beams(oracle, prompt, BeamSearchParams(**options))
    seen = sorted({token for tokens, _ in free for token in tokens[len(tokens) // 3 :]})
    params = BeamSearchParams(
        **options,
        length_penalty=draw.choice([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=draw.choice([True, False, "never"]),
        n=draw.choice([None, 1, width]),
        ignore_eos=True,
        stop_token_ids=draw.sample(seen, min(len(seen), draw.choice([0, 1, 2, 3]))) or None,
    )
    return Search(prompt, params, expected_beams(oracle, prompt, params))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With an oracle in float64, whose comparisons do not hang on the last bit of ours."""
    path = tmp_path_factory.mktemp("beams")
    oracle = make_checkpoint(path, seed=2, **SETTINGS[request.param]).double()
    draw = random.Random(f"{request.param} 1")  # one that draws searches of all kinds
    searches = [draw_search(draw, oracle) for _ in range(9)]
    # Two that begin alike, and one prompt twice
    twin = Search(searches[0].prompt, searches[1].params, [])
    twin.expected = expected_beams(oracle, twin.prompt, twin.params)
    others = [draw_prompt(draw, draw.choice([3, 8, 30])) for _ in range(4)]
    others.append(searches[0].prompt)
    greedy = [(prompt, greedy_tokens(oracle, prompt, 14)) for prompt in others]
    return Model(path, oracle, [*searches, twin], greedy)


def score(completion: CompletionOutput, params: BeamSearchParams) -> float:
    assert completion.cumulative_logprob is not None
    return completion.cumulative_logprob / len(completion.token_ids) ** params.length_penalty


def check_beams(output: RequestOutput, search: Search) -> None:
    assert output.prompt_token_ids == search.prompt
    assert [c.token_ids for c in output.outputs] == [t for t, _ in search.expected], search
    assert [c.index for c in output.outputs] == list(range(len(output.outputs)))
    scores = [score(completion, search.params) for completion in output.outputs]
    assert scores == pytest.approx([s for _, s in search.expected], rel=1e-4, abs=1e-4)
    for completion in output.outputs:
        stopped = completion.token_ids[-1] in (search.params.stop_token_ids or ())
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert completion.logprobs is None


def search_all(llm: LLM, model: Model) -> None:
    """All searches at once, with different parameters, among ordinary requests."""
    engine = llm.engine
    requests = []
    for index, search in enumerate(model.searches):
        request = engine.make_beam_request(f"beams {index}", search.prompt, search.params)
        requests.append(request)
        if index < len(model.others):
            requests.append(llm.make_request(model.others[index][0], GREEDY))
    results = {}
    for output in llm.stream(requests):
        results[output.request_id] = output
        check_invariants(engine)
    outputs = [results[request.request_id] for request in requests]
    beams = [output for output in outputs if output.request_id.startswith("beams")]
    greedy = [output for output in outputs if not output.request_id.startswith("beams")]
    for output, search in zip(beams, model.searches, strict=True):
        check_beams(output, search)
    assert [o.outputs[0].token_ids for o in greedy] == [tokens for _, tokens in model.others]
    assert llm.get_metrics().num_free_blocks == llm.get_metrics().num_blocks


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 400, "max_num_batched_tokens": 400},
        {"num_blocks": 10, "max_num_batched_tokens": 64},
        {"num_blocks": 10, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"num_blocks": 30, "max_num_batched_tokens": 5},
        {"num_blocks": 400, "max_num_seqs": 6, "enable_prefix_caching": False},
        {"num_blocks": 12, "host_cache_memory": 1 << 22},
    ],
)
def test_beams_equal_transformers(model: Model, options: dict[str, Any]) -> None:
    with make_llm(model.path, **options) as llm:
        search_all(llm, model)
        metrics = llm.get_metrics()
        if options["num_blocks"] == 10:
            assert metrics.num_preemptions > 0
        if "host_cache_memory" in options:
            assert metrics.num_loaded_tokens > 0
        if "max_num_seqs" not in options:
            search_all(llm, model)  # now that the cache holds other beams of the same prompts
        if options["num_blocks"] == 400 and options.get("enable_prefix_caching", True):
            assert llm.get_metrics().num_cached_tokens > metrics.num_cached_tokens
        assert llm.get_metrics().num_leaked_blocks == 0


def test_prompts_of_one_call_come_back_in_order(model: Model) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    prompts = [search.prompt for search in model.searches[:6]]
    with make_llm(model.path) as llm:
        outputs = llm.beam_search(prompts, params, use_tqdm=False)
        (alone,) = llm.beam_search(prompts[0], params, use_tqdm=False)
    for output, prompt in zip([*outputs, alone], [*prompts, prompts[0]], strict=True):
        check_beams(output, Search(prompt, params, expected_beams(model.oracle, prompt, params)))


def test_the_searches_are_no_easy_ones(model: Model) -> None:
    lengths = [{len(tokens) for tokens, _ in search.expected} for search in model.searches]
    assert sum(len(each) > 1 for each in lengths) >= 1
    stops = [set(search.params.stop_token_ids or ()) for search in model.searches]
    ends = [
        {tokens[-1] in stop for tokens, _ in search.expected}
        for search, stop in zip(model.searches, stops, strict=True)
    ]
    assert sum(True in each for each in ends) >= 3
    assert sum(False in each for each in ends) >= 3
    greedy = [greedy_tokens(model.oracle, s.prompt, len(s.expected[0][0])) for s in model.searches]
    assert sum(g != s.expected[0][0] for g, s in zip(greedy, model.searches, strict=True)) >= 3


def test_the_end_of_sequence_token_ends_beams(tmp_path: Path) -> None:
    """As config.json names it, unless it is ignored."""
    oracle = make_checkpoint(tmp_path, seed=2).double()
    prompt = [5, 6, 7]
    free = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    eos = expected_beams(oracle, prompt, free)[0][0][3]
    oracle = make_checkpoint(tmp_path, seed=2, eos_token_id=eos).double()
    assert isinstance(oracle, transformers.LlamaForCausalLM)
    ending = BeamSearchParams(beam_width=3, max_tokens=8, stop_token_ids=[eos])
    with make_llm(tmp_path) as llm:
        (output,) = llm.beam_search(
            prompt, BeamSearchParams(beam_width=3, max_tokens=8), use_tqdm=False
        )
        check_beams_of = [c.token_ids for c in output.outputs]
        assert check_beams_of == [t for t, _ in expected_beams(oracle, prompt, ending)]
        assert "stop" in [c.finish_reason for c in output.outputs]
        (output,) = llm.beam_search(prompt, free, use_tqdm=False)
        check_beams(output, Search(prompt, free, expected_beams(oracle, prompt, free)))


def test_the_context_ends_beams(tiny_checkpoint: Path) -> None:
    prompt = list(range(3, 60))
    params = BeamSearchParams(beam_width=4, max_tokens=100, ignore_eos=True)
    with make_llm(tiny_checkpoint) as llm:
        (output,) = llm.beam_search(prompt, params, use_tqdm=False)
        assert [len(c.token_ids) for c in output.outputs] == [7] * 4
        short = BeamSearchParams(beam_width=4, max_tokens=7, ignore_eos=True)
        (same,) = llm.beam_search(prompt, short, use_tqdm=False)
    assert [c.token_ids for c in same.outputs] == [c.token_ids for c in output.outputs]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], {}, "prompt 1: .*at least one token"),
        ([[1], [199]], {}, r"prompt 1: .*got 199 at position 0"),
        ([[1] * 64], {}, "prompt 0: .*at most 63 tokens"),
        ([[1]], {"beam_width": 9}, "beam_width must be at most max_num_seqs = 8, got 9"),
        ([[1]], {"stop_token_ids": [200]}, r"stop_token_ids must lie in \[0, 199\), got 200"),
        ([{"prompt_token_ids": [1], "cache_salt": ""}], {}, "cache_salt must be a string"),
        (["text"], {}, "skip_tokenizer_init"),
    ],
)
def test_what_cannot_be_searched(
    tiny_checkpoint: Path, prompts: Any, params: dict[str, Any], message: str
) -> None:
    with make_llm(tiny_checkpoint, max_num_seqs=8) as llm:
        own = BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **params})
        with pytest.raises(ValueError, match=message):
            llm.beam_search(prompts, own, use_tqdm=False)
        assert not llm.engine.has_work
        assert llm.get_metrics().num_steps == 0


def test_parameters_of_another_kind_are_refused(tiny_checkpoint: Path) -> None:
    with make_llm(tiny_checkpoint) as llm:
        for wrong in (SamplingParams(), None, {"beam_width": 2}):
            with pytest.raises(ValueError, match="must be a BeamSearchParams, got"):
                llm.beam_search([1], wrong, use_tqdm=False)  # type: ignore[arg-type]


def test_more_candidates_than_there_are_logprobs() -> None:
    runner = FakeRunner()
    runner.model_config.vocab_size = 5000
    llm = LLM.from_engine(make_engine(runner, max_num_seqs=1024))
    params = BeamSearchParams(beam_width=513, max_tokens=3)
    with pytest.raises(
        ValueError, match=r"beam_width = 513 and 1 end tokens need the 1026 .*at most 1024"
    ):
        llm.beam_search([1], params, use_tqdm=False)


def test_more_candidates_than_the_vocabulary(tiny_checkpoint: Path) -> None:
    """Of 199 tokens each beam looks at all, where it would look at more."""
    stops = list(range(100, 199))
    params = BeamSearchParams(beam_width=5, max_tokens=4, ignore_eos=True, stop_token_ids=stops)
    with make_llm(tiny_checkpoint) as llm:
        (output,) = llm.beam_search([5, 6], params, use_tqdm=False)
    assert len(output.outputs) == 5
