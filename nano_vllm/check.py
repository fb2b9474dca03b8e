"""Compare a model with transformers on random weights: python -m nano_vllm.check ARCHITECTURE.

What the tests of the model families do, layer by layer, for whoever adds one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_vllm.cli import FAILURE, ArgumentParser, run_command

if TYPE_CHECKING:
    import torch

    from nano_vllm.runner.model_runner import ModelRunner

TOLERANCE = 1e-4
"""Of logits, in float32."""
VOCAB_SIZE, NUM_LAYERS, NUM_HEADS, HEAD_DIM, WINDOW = 199, 6, 4, 64, 12
"""Of the model that is compared; layers at most, the head dimension if the model has none."""
NUM_TOKENS, CHUNK, BLOCK_SIZE = 63, 13, 8
USUAL = {"attention_multiplier": 1 / HEAD_DIM}
"""What checkpoints set where transformers' default is out of proportion."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 where all logits agree, else 1, or 2 for bad usage."""
    parser = ArgumentParser(prog="python -m nano_vllm.check", description=__doc__)
    parser.add_argument(
        "model",
        help="an architecture as config.json names it, or a folder whose config.json is taken, "
        "with fewer and narrower layers",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights [0]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return run_command(lambda: check(args), args.debug)


def check(args: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        oracle = small_model(args.model, args.seed)
        oracle.save_pretrained(folder)
        rows = differences(Path(folder), oracle, args.seed)
    print(f"{type(oracle).__name__}, {NUM_TOKENS} tokens in chunks of {CHUNK}, float32 on a CPU")
    print(f"{'':<12}{'largest difference':>20}{'largest value':>16}")
    for name, difference, largest in rows:
        print(f"{name:<12}{difference:>20.1e}{largest:>16.3g}")
    agrees = rows[-1][1] <= TOLERANCE
    print(f"logits {'agree' if agrees else 'differ'}: at most {TOLERANCE:.0e} is allowed")
    return 0 if agrees else FAILURE


def small_model(model: str, seed: int) -> Any:
    """A transformers model of an architecture, or of the config.json in a folder, with random
    weights in float32 and few of them.
    """
    from nano_vllm.models.registry import model_class

    settings: dict[str, Any] = {}
    architecture = model
    if Path(model).is_dir():
        from nano_vllm.weights.json_file import read_json_object

        settings = read_json_object(Path(model) / "config.json")
        architecture = str((settings.get("architectures") or ["none"])[0])
    family = model_class(architecture)
    try:
        import transformers
    except ImportError:
        raise ValueError("check needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    oracle_class = getattr(transformers, architecture)
    config_class = oracle_class.config_class
    if not settings:
        settings = {k: v for k, v in USUAL.items() if hasattr(config_class, k)}
    config = config_class(**shrunk(settings, family))
    return randomize(oracle_class(config), seed)


def shrunk(settings: dict[str, Any], family: Any) -> dict[str, Any]:
    """The fields of a config.json with few, narrow layers, but heads and positions as they are."""

    def name(field: str) -> str:
        return family.config_names.get(field, field)

    heads = settings.get(name("num_attention_heads"))
    head_dim = settings.get("head_dim") or (
        settings[name("hidden_size")] // heads if heads else HEAD_DIM
    )
    num_layers = min(NUM_LAYERS, settings.get(name("num_hidden_layers")) or NUM_LAYERS)
    is_multi_head = heads == settings.get("num_key_value_heads", heads)
    changes = {
        "vocab_size": VOCAB_SIZE,
        name("hidden_size"): NUM_HEADS * head_dim,
        name("intermediate_size"): 3 * head_dim,
        name("num_hidden_layers"): num_layers,
        name("num_attention_heads"): NUM_HEADS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if name("hidden_size") == "hidden_size":
        changes["num_key_value_heads"] = NUM_HEADS if heads and is_multi_head else NUM_HEADS // 2
    if name("hidden_size") == "hidden_size" and ("head_dim" in settings or not heads):
        changes["head_dim"] = head_dim
    if family.sliding_layers != "none" and settings.get("sliding_window", WINDOW) is not None:
        changes["sliding_window"] = WINDOW
    if "max_window_layers" in settings:
        changes["max_window_layers"] = num_layers // 2
    for per_layer in ("layer_types", "no_rope_layers"):
        if settings.get(per_layer) is not None:
            changes[per_layer] = settings[per_layer][:num_layers]
    return settings | changes


def randomize(model: Any, seed: int) -> Any:
    """Fill a transformers model with weights larger than the usual start, for logits far enough
    apart that the largest one means something, and no larger, so that rounding does not grow from
    layer to layer. Norms and biases stay around where they start.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.12 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.normal_(0.0, 1.4 * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def differences(folder: Path, oracle: Any, seed: int) -> list[tuple[str, float, float]]:
    """Behind the embeddings, each layer and the head: name, largest difference, largest value."""
    import torch

    from nano_vllm.config import EngineConfig
    from nano_vllm.runner.model_runner import ModelRunner

    runner = ModelRunner(
        EngineConfig(
            model=str(folder),
            device="cpu",
            dtype="float32",
            num_blocks=2 * NUM_TOKENS // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_model_len=2 * NUM_TOKENS,
        )
    )
    draw = random.Random(seed)
    prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(NUM_TOKENS)]
    ours: list[list[torch.Tensor]] = []
    for index, layer in enumerate(runner.model.model.layers.values()):
        ours.append([])
        layer.register_forward_hook(_stream_recorder(ours, index))
    base = getattr(oracle, oracle.base_model_prefix)
    theirs: list[torch.Tensor] = []
    for layer in base.layers if hasattr(base, "layers") else base.h:
        layer.register_forward_hook(
            lambda _, __, out: theirs.append(out[0] if isinstance(out, tuple) else out)
        )
    (logits,) = logits_of_all_positions(runner, [prompt], CHUNK)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    pairs = [
        (f"layer {index}", torch.cat(parts), states.view(NUM_TOKENS, -1))
        for index, (parts, states) in enumerate(zip(ours, theirs, strict=True))
    ]
    return [
        (name, float((got - wanted).abs().max()), float(wanted.abs().max()))
        for name, got, wanted in [*pairs, ("logits", logits, expected)]
    ]


def _stream_recorder(streams: list[list[torch.Tensor]], index: int) -> Callable[..., None]:
    def record(_: Any, __: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        contribution, stream = out
        streams[index].append(stream + contribution)

    return record


def logits_of_all_positions(
    runner: ModelRunner, prompts: list[list[int]], chunk: int
) -> list[torch.Tensor]:
    """Logits of every position of the prompts, computed in mixed batches of chunks on shuffled
    blocks of an empty cache.
    """
    import torch

    from nano_vllm.batch import Batch, ScheduledSequence
    from nano_vllm.sampling_params import SamplingParams
    from nano_vllm.sequence import Sequence

    cache, block_size = runner.kv_cache, runner.block_size
    assert cache is not None
    cache.pool.fill_(float("nan"))
    blocks = random.Random(0).sample(range(cache.num_blocks), cache.num_blocks)
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(index, str(index), 0, prompt, SamplingParams())
        sequence.block_table = [blocks.pop() for _ in range(-(-len(prompt) // block_size))]
        sequences.append(sequence)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while unfinished := [s for s in sequences if s.num_computed_tokens < s.num_tokens]:
        batch = Batch(
            [
                ScheduledSequence(
                    s,
                    min(chunk, s.num_tokens - s.num_computed_tokens),
                    samples=False,
                    start=s.num_computed_tokens,
                )
                for s in unfinished
            ]
        )
        with torch.inference_mode():
            inputs = runner.input_batch.prepare(batch)
            hidden = runner.model(
                inputs.input_ids, inputs.positions, cache.layers, inputs.attention
            )
            logits = runner.model.compute_logits(hidden)
        parts = logits.split([s.num_tokens for s in batch.scheduled])
        for scheduled, part in zip(batch.scheduled, parts, strict=True):
            rows[scheduled.sequence.seq_id].append(part.clone())
            scheduled.sequence.num_computed_tokens += scheduled.num_tokens
    return [torch.cat(parts) for parts in rows]


if __name__ == "__main__":
    sys.exit(main())
