"""`nano-vllm generate|serve|bench|plan ...` is `python -m nano_vllm.generate ...` and so on."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "generate": ("nano_vllm.generate", "prompts in, text out"),
    "serve": ("nano_vllm.serve", "the OpenAI API"),
    "bench": ("nano_vllm.bench.__main__", "benchmarks"),
    "plan": ("nano_vllm.plan.__main__", "what a model needs of GPUs, and how fast they would be"),
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    width = max(map(len, COMMANDS))
    print("usage: nano-vllm COMMAND ..., where --help behind a command tells its options\n")
    for command, (_, purpose) in COMMANDS.items():
        print(f"  {command.ljust(width)}  {purpose}")
    if name in ("-h", "--help"):
        return 0
    if name:
        print(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
