"""Renders chat templates in a process of its own, with little time and memory.

A template comes from a checkpoint, that is from a stranger. Jinja's sandbox keeps it from Python's
objects, but not from loops without end or texts of terabytes.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CPU_SECONDS = 2
"""For a conversation. Well-known templates take milliseconds."""
MAX_BYTES = 1 << 30
"""Of address space, the interpreter's included."""
_MARKS, _AS_WRITTEN = "the marks", "as written"
"""Of the context and of a filter; with a space, so that no template has such a name."""


def serve() -> None:
    """Answer each line of standard input by one of standard output, both JSON: a template's source
    and its variables by the text, or by what is wrong; a source alone by its literals. `marks` are
    characters in the variables that stand for others (`caller_text`).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for line in sys.stdin:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(usage.ru_utime + usage.ru_stime) + MAX_CPU_SECONDS
        # Beyond it the kernel ends the process, whatever it is at.
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        print(json.dumps(_answer(**json.loads(line))), flush=True)


def _answer(
    source: str,
    variables: dict[str, Any] | None = None,
    marks: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    try:
        if variables is None:
            return {"literals": _literals(source)}
        return {"text": _compiled(source).render({**variables, _MARKS: marks})}
    except jinja2.TemplateSyntaxError as error:
        return {"problem": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"problem": str(error)}
    except MemoryError:
        return {"problem": f"needs more than {MAX_BYTES} bytes of memory"}
    except Exception as error:  # whatever an expression of the template may raise
        return {"problem": f"{type(error).__name__}: {error}"}


@cache
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    environment.filters["tojson"] = _to_json
    environment.filters[_AS_WRITTEN] = _as_written
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(_CompareAsWritten().visit(environment.parse(source)))


def _literals(source: str) -> list[str]:
    """The strings and names of attributes in a template's expressions."""
    tree = _environment().parse(source)
    values = [node.value for node in tree.find_all(nodes.Const)]
    names = [node.attr for node in tree.find_all(nodes.Getattr)]
    return sorted({value for value in values if isinstance(value, str)} | set(names))


def _environment() -> jinja2.Environment:
    # trim_blocks and lstrip_blocks are what templates on the hub are written for.
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )


class _CompareAsWritten(NodeTransformer):
    """Has `==`, `in` and the like see what marks stand for: nothing of it reaches the text."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for operand in (node, *node.ops):
            assert isinstance(operand, nodes.Compare | nodes.Operand)
            operand.expr = nodes.Filter(operand.expr, _AS_WRITTEN, [], [], None, None)
        return node


@jinja2.pass_context
def _as_written(context: Context, value: Any) -> Any:
    return _without_marks(value, context[_MARKS])


def _without_marks(value: Any, characters: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for mark, character in characters.items():
            value = value.replace(mark, character)
        return value
    if isinstance(value, dict):
        return {_without_marks(k, characters): v for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_marks(v, characters) for v in value)
    return value


class _GenerationTag(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its body is all that
    counts.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja's way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes for HTML, which would reach the model."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
