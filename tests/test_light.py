"""Start in seconds: what a quick command imports. Seen by names, not by the clock."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "gguf",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "tqdm",
    "matplotlib",
    "msgspec",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "asyncio",
    "nano_vllm.ops",
}

REPORT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
"""


def modules_after(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after running the code."""
    result = subprocess.run(
        [sys.executable, "-c", REPORT + code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stderr.splitlines()[-1]))


def test_the_report_sees_imports() -> None:
    assert {"json", "decimal"} <= modules_after("import decimal")


@pytest.mark.parametrize(
    "names", ["nano_vllm", "SamplingParams", "EngineConfig", "CompletionOutput, RequestOutput"]
)
def test_import_is_light(names: str) -> None:
    code = "import nano_vllm" if names == "nano_vllm" else f"from nano_vllm import {names}"
    modules = modules_after(code)
    assert "nano_vllm" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("command", ["generate", "serve", "bench", "check", "plan"])
def test_help_is_light(command: str) -> None:
    """`python -m nano_vllm.<command> --help`."""
    modules = modules_after(
        "import runpy\n"
        "sys.argv = ['nano_vllm', '--help']\n"
        f"runpy.run_module('nano_vllm.{command}', run_name='__main__', alter_sys=True)"
    )
    assert "argparse" in modules
    assert not HEAVY & modules
