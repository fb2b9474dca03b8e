"""Imports run downward, torch stays where it belongs, and no code comes from data."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nano_vllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports from its own room and from lower ones; rooms on one line do not know each other.
FLOORS = (
    (
        "config",
        "config_fields",
        "model_family",
        "model_size",
        "sampling_params",
        "sequence",
        "batch",
        "logprob",
        "outputs",
        "metrics",
        "step_record",
        "_core",
    ),
    ("ops",),
    ("quantization", "distributed"),
    ("layers", "gpus"),
    ("cache", "models", "sampling", "weights"),
    ("tokenizer", "speculative", "engine.waiting_queue", "engine.beam_group", "engine.step_cost"),
    ("engine.running_sequences",),
    ("engine.admission", "engine.beam_searches", "engine.prefill_pace"),
    ("engine.scheduler", "runner"),
    ("engine",),
    ("server",),
    ("cli",),
    ("", "__main__", "generate", "serve", "bench", "check", "plan", "ray_app"),
)
PLAIN_DATA = FLOORS[0]
SCHEDULING = (
    "engine.scheduler",
    "engine.admission",
    "engine.beam_group",
    "engine.beam_searches",
    "engine.prefill_pace",
    "engine.running_sequences",
    "engine.step_cost",
    "engine.waiting_queue",
    "cache.block_manager",
    "cache.ledger",
)
LIGHT = (
    *(room for room in PLAIN_DATA if room != "logprob"),
    *SCHEDULING,
    "",
    "__main__",
    "cli",
    "generate",
    "serve",
    "check",
    "gpus",
    "server.server_config",
    "bench.__main__",
    "plan",
    "distributed.all_reduce_way",
    "distributed.partition",
    "distributed.stages",
    "models.registry",
    "runner.graph_shapes",
    "runner.input_layout",
    "runner.limits",
    "runner.memory",
    "sampling.gathering",
    "sampling.logprob_rows",
    "distributed.launch",
    "engine.router",
    "sampling.beam_search",
)
TORCH_FREE = (
    *LIGHT,
    "tokenizer",
    "distributed.interfaces",
    "distributed.progress",
    "distributed.sharding",
    "distributed.watchdog",
    "server",
    "ray_app",
    "engine.async_llm",
    "engine.engine_process",
    "engine.event_log",
    "engine.messages",
    "engine.output_stream",
    "engine.rank_processes",
    "engine.replicas",
    "bench.replay",
    "bench.replay_picture",
)
HEAVY = {
    "torch",
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
    "ray",
}


def module_of(path: Path) -> str:
    """Inside the package: "" for its __init__, "engine.scheduler" for that file."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__")


def room_of(module: str) -> str:
    rooms = [room for floor in FLOORS for room in floor]
    while module and module not in rooms:
        module = module.rpartition(".")[0]
    return module


def is_in(rooms: tuple[str, ...], path: Path) -> bool:
    module = module_of(path)
    return any(module == room or (room and module.startswith(f"{room}.")) for room in rooms)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(tree: ast.Module) -> ast.Module:
    """What runs on import: no function bodies, nothing that is for type checkers alone."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Prune().visit(tree)


@pytest.fixture(params=FILES, ids=module_of)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_imports_run_downward(path: Path, tree: ast.Module) -> None:
    floors = {room: level for level, floor in enumerate(FLOORS) for room in floor}
    room = room_of(module_of(path))
    assert room or not module_of(path), "a new room: give it a floor"
    for name in imports_of(tree):
        if name.startswith("nano_vllm."):
            other = room_of(name.removeprefix("nano_vllm."))
            allowed = other == room or other in PLAIN_DATA or floors[other] < floors[room]
            assert allowed, f"{module_of(path)!r} imports {name}, which is not below it"


def test_heavy_imports_stay_out(path: Path, tree: ast.Module) -> None:
    imported = {name.split(".")[0] for name in imports_of(top_level(tree))}
    forbidden = {"transformers"}
    if is_in(LIGHT, path):
        forbidden |= HEAVY
    if is_in(TORCH_FREE, path):
        forbidden |= {"torch"}
    assert not imported & forbidden, f"at module level: {', '.join(imported & forbidden)}"


def test_scheduler_is_pure() -> None:
    """No tensors, clock, randomness, files or environment: they are handed in or stay outside."""
    impure = {"torch", "numpy", "time", "random", "secrets", "os", "pathlib", "io", "threading"}
    for module in SCHEDULING:
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not impure & {name.split(".")[0] for name in imports_of(tree)}, module


def test_no_code_from_data(tree: ast.Module) -> None:
    """No pickle, eval, exec, torch.load or remote code."""
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not unsafe & {name.split(".")[0] for name in imports_of(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "compile", "__import__"}, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.load", f"line {node.lineno}"
        elif isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}"


def test_torch_stops_at_the_bindings() -> None:
    foreign = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2|pybind11|Python\.h)", re.M)
    for source in (ROOT / "csrc").rglob("*.*"):
        if "bindings" not in source.parts and source.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            found = foreign.search(source.read_text(encoding="utf-8"))
            assert found is None, f"{source.relative_to(ROOT)}: {found and found[0]}"
    for path in FILES:
        if path.name != "ops.py":
            assert "torch.ops" not in path.read_text(encoding="utf-8"), path.name
