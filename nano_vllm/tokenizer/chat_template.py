"""Chat templates: Jinja from a checkpoint, that is from a stranger, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2


class ChatTemplate:
    """Renders a conversation as transformers' apply_chat_template does.

    Args: source: the template, or several by name; of those, "tool_use" renders conversations with
        tools and "default"
            the others.
        special_tokens: bos_token, eos_token and the like, as templates know them.
        origin: the file it comes from, for errors.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str], origin: str
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt; ValueError in one line if the template is broken or refuses the messages."""
        import jinja2

        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"a chat message must be an object with a role, got {message!r}")
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = ", ".join(self._sources)
            raise ValueError(
                f"{self._origin} has no chat template named 'default'; it has: {known}"
            )
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self._sources[name])
            return self._compiled[name].render(
                **{
                    **self._special_tokens,
                    "documents": None,
                    **variables,
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {error.message}"
        except jinja2.TemplateError as error:
            problem = str(error)
        except Exception as error:  # whatever an expression of the template may raise
            problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"chat template of {self._origin}: {' '.join(problem.split())}")


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what the model wrote, for training; here its body is all that
        counts.
        """

        tags = {"generation"}  # noqa: RUF012  (jinja's way)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # trim_blocks and lstrip_blocks are what templates on the hub are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


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


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
