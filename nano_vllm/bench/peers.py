"""Other engines on the same model file and the same workload, where they are installed."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

from nano_vllm.bench.workload import Workload


def measure(
    peer: str, path: Path, device: str, workload: Workload, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one peer, medians; ValueError where it is not installed or cannot run this model."""
    if peer == "transformers":
        _require("transformers", "transformers")
        dtypes = ["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
        return [_transformers(path, device, dtype, workload, repeats) for dtype in dtypes]
    _require("llama_cpp", "llama-cpp-python")
    if path.suffix != ".gguf":
        raise ValueError(f"the peer llama.cpp needs a .gguf file, got {path}")
    return [_llama_cpp(path, workload, repeats)]


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the peer needs {package}: pip install {package}")


def _transformers(
    path: Path, device: str, dtype: str, workload: Workload, repeats: int
) -> dict[str, Any]:
    """One static batch, all prompts and outputs of one length, greedy, with its own KV cache."""
    import torch
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)
    model = model.to(device).eval()
    inputs = torch.tensor(workload.prompts, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                min_new_tokens=workload.output_lens[0],
                max_new_tokens=workload.output_lens[0],
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    figures = workload.figures(statistics.median(seconds[1:]))
    return {"engine": "transformers", "dtype": dtype} | figures


def _llama_cpp(path: Path, workload: Workload, repeats: int) -> dict[str, Any]:
    """One request after the other: llama-cpp-python has no batched generation."""
    import torch
    from llama_cpp import Llama

    context = max(workload.input_lens) + max(workload.output_lens)
    llama = Llama(
        str(path),
        n_ctx=context,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
            llama.reset()
            tokens = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
            for _ in range(output_len):
                next(tokens)
        seconds.append(time.perf_counter() - start)
    figures = workload.figures(statistics.median(seconds[1:]))
    return {"engine": "llama.cpp", "dtype": path.stem.rsplit(".", 1)[-1]} | figures
