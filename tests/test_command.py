"""`nano-vllm`, one command for all."""

from __future__ import annotations

from typing import Any

import pytest

from nano_vllm.__main__ import COMMANDS, main


def test_without_a_command_it_tells_them(capsys: Any) -> None:
    assert main([]) == main(["none"]) == 2
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "error: unknown command 'none'; known: generate, serve, bench, plan\n"
    for command in COMMANDS:
        assert out.count(f"\n  {command} ") == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_the_modules(capsys: Any, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m nano_vllm.{command}" in capsys.readouterr().out
