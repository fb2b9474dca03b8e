"""A model over a float8 KV cache: its logits are those of transformers with keys and values rounded
to float8 before they are attended to.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from nano_vllm.config import EngineConfig
from nano_vllm.engine.llm import LLM
from nano_vllm.runner.model_runner import ModelRunner
from nano_vllm.sampling_params import SamplingParams
from tests.models.checkpoints import make_checkpoint
from tests.models.test_against_transformers import LENGTHS, logits_of_all_positions

NUM_KV_HEADS = 2
SCALES: dict[str, dict[str, torch.Tensor]] = {
    "absent": {},
    "vLLM": {"k_scale": torch.tensor(0.02), "v_scale": torch.tensor([0.5])},
    "of the projections": {
        "k_proj.k_scale": torch.tensor(0.03).bfloat16(),
        "v_proj.v_scale": torch.tensor(0.7),
    },
    "of heads": {
        "attn.k_scale": torch.tensor([0.015, 0.05]),
        "attn.v_scale": torch.tensor([[[0.1]], [[0.6]]]),
    },
}
"""Tensors of each layer's self_attn, by whose names they are."""


def rounded(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[batch, num_kv_heads, num_tokens, head_dim] as a float8 cache would hold it."""
    scale = scale.float().flatten().expand(NUM_KV_HEADS)[:, None, None]
    return (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def rounding_attention(
    module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any
) -> Any:
    key, value = rounded(key, module.k_scale), rounded(value, module.v_scale)
    return eager_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register("rounding", rounding_attention)
AttentionMaskInterface.register("rounding", eager_mask)


def make_model(folder: Path, scales: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A checkpoint with these scales in every layer, and its oracle."""
    oracle = make_checkpoint(folder, seed=7)
    oracle.set_attn_implementation("rounding")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for i, layer in enumerate(oracle.model.layers):
        for name in ("k_scale", "v_scale"):
            setattr(layer.self_attn, name, torch.ones(1))
        for name, scale in scales.items():
            tensors[f"model.layers.{i}.self_attn.{name}"] = scale.clone()
            setattr(layer.self_attn, name.split(".")[-1], scale)
    save_file(tensors, path, {"format": "pt"})
    return oracle


@pytest.mark.parametrize("name", SCALES)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    oracle = make_model(tmp_path, SCALES[name])
    draw = random.Random(name)
    prompts = [[draw.randrange(199) for _ in range(length)] for length in LENGTHS]
    ours = logits_of_all_positions(tmp_path, prompts, chunk=13, kv_cache_dtype="fp8")
    for prompt, logits in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0]
        # A number beside the middle between two of float8 may be rounded to either; that is rare.
        error = (logits - expected).abs()
        assert float(error.median()) < 1e-3
        assert float(error.max()) < 0.2


def test_without_float8_the_scales_do_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "with", SCALES["vLLM"])
    make_model(tmp_path / "without", {})
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    logits = [logits_of_all_positions(tmp_path / n, prompts, 13)[0] for n in ("with", "without")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("alias", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation(tmp_path: Path, alias: str, dtype: str) -> None:
    """Shared blocks are copied and prefixes found as in any cache."""
    make_model(tmp_path, SCALES["of heads"])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [list(range(3, 43)), list(range(3, 43)), list(range(3, 30)), [9]]
    with LLM(
        str(tmp_path),
        device="cpu",
        dtype=dtype,
        kv_cache_dtype=alias,
        skip_tokenizer_init=True,
        block_size=8,
    ) as llm:
        together = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        alone = [llm.generate([p], params, use_tqdm=False)[0].outputs[0].token_ids for p in prompts]
    assert together == alone


def test_half_of_the_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)

    def runner(**options: Any) -> ModelRunner:
        return ModelRunner(
            EngineConfig(
                model=str(tmp_path),
                device="cpu",
                dtype="bfloat16",
                kv_cache_memory=10**6,
                **options,
            )
        )

    plain, halved = runner(), runner(kv_cache_dtype="fp8")
    assert halved.num_blocks in (2 * plain.num_blocks, 2 * plain.num_blocks + 1)
    for one in (plain, halved):
        assert one.kv_cache is not None
        assert one.kv_cache.pool.nbytes <= 10**6
    assert halved.kv_cache is not None
    assert halved.kv_cache.pool.dtype == torch.float8_e4m3fn


def test_unknown_cache_dtype() -> None:
    message = "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, got 'int8'"
    with pytest.raises(ValueError, match=message):
        EngineConfig(kv_cache_dtype="int8")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(0.0), r"self_attn\.k_scale': must be finite and positive, got \[0\.0\]"),
        (torch.tensor(torch.nan), r"must be finite and positive, got \[nan\]"),
        (torch.ones(3), r"must have 1 or 2 elements, got \[3\]"),
    ],
)
def test_bad_scales(tmp_path: Path, scale: torch.Tensor, message: str) -> None:
    make_model(tmp_path, {"k_scale": scale})
    with pytest.raises(ValueError, match=message):
        ModelRunner(EngineConfig(model=str(tmp_path), device="cpu", num_blocks=16))
