"""The process that the startup benchmark times; prints one line of JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from nano_vllm.cli import run_command
from nano_vllm.metrics import LapTimer


def main() -> int:
    return run_command(lambda: _start(json.loads(sys.argv[1])), debug=False)


def _start(request: dict[str, Any]) -> int:
    """Load and generate one token, by the request of `startup`."""
    timer = LapTimer(start=request["start"])
    timer.lap("python")
    import_module("torch")
    timer.lap("import torch")
    import_module("nano_vllm.runner.model_runner")  # which the engine would import later
    from nano_vllm.bench.engine_run import EngineRun
    from nano_vllm.bench.workload import Workload
    from nano_vllm.engine.llm import LLM

    timer.lap("import nano_vllm")
    with LLM(**request["options"]) as llm:
        engine = EngineRun.of(llm)
        loading = llm.engine.runner.load_laps
        timer.laps |= loading
        timer.lap("engine")
        timer.laps["engine"] -= sum(loading.values())
        length = (request["input_len"],) * 2
        workload = Workload.random(1, length, (1, 1), engine.config.vocab_size, 0)
        workload.generate(llm, 0.0)
        timer.lap("first token")
    result = {
        "model": engine.path.name,
        "dtype": engine.dtype_name,
        "device": engine.device.type,
        "seconds": timer.laps | {"total": timer.total},
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
