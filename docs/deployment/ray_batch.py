"""A file of prompts through a model on all GPUs of a Ray cluster, by Ray Data:

pip install 'nano_vllm[ray]'
python ray_batch.py --model /models/NAME --input prompts.jsonl --output texts/ --replicas 8

A line of the input is {"prompt": "...", ...}; a line of the output has a "text" besides.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.data

from nano_vllm import LLM, SamplingParams


class Generate:
    """A model in a worker of Ray's; a batch is one call, whose prompts run together."""

    def __init__(self, model: str, device: str, params: SamplingParams) -> None:
        self._llm = LLM(model, device=device)
        self._params = params

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        outputs = self._llm.generate(list(batch["prompt"]), self._params, use_tqdm=False)
        return {**batch, "text": [output.outputs[0].text for output in outputs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True, help="a file or folder of JSON lines")
    parser.add_argument("--output", required=True, help="a folder")
    parser.add_argument("--replicas", type=int, default=1, help="engines, each with a GPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=1024, help="prompts of one call")
    args = parser.parse_args()
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    ray.data.read_json(args.input, lines=True).map_batches(
        Generate,
        fn_constructor_args=(args.model, args.device, params),
        batch_size=args.batch_size,
        num_gpus=1 if args.device == "cuda" else 0,
        compute=ray.data.ActorPoolStrategy(size=args.replicas),
    ).write_json(args.output)


if __name__ == "__main__":
    main()
