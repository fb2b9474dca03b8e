"""Chat templates: Jinja from a checkpoint, that is from a stranger."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from nano_vllm.tokenizer.caller_text import (
    CallerText,
    RenderedChat,
    free_characters,
    unescape_marks,
)


class ChatTemplate:
    """Renders a conversation as transformers' apply_chat_template does.

    A process of its own does it, which is started with the first conversation and has little time
    and memory (`template_sandbox`). Messages, tools and variables must be JSON.

    Args:
        source: the template, or several by name; of those, "tool_use" renders conversations with
            tools and "default" the others.
        named_tokens: bos_token, eos_token and the like, as templates know them.
        origin: the file it comes from, for errors.
    """

    def __init__(
        self, source: str | Mapping[str, str], named_tokens: Mapping[str, str], origin: str
    ) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._named_tokens = dict(named_tokens)
        self._origin = origin
        self._sandbox = _Sandbox()
        self._caller_texts: dict[tuple[str, frozenset[str]], CallerText] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        special: frozenset[str] = frozenset(),
        goes_on: bool = False,
    ) -> RenderedChat:
        """The prompt; ValueError in one line if the template is broken, takes too long or refuses
        the messages.

        Args:
            messages, add_generation_prompt, tools, documents: as templates know them; content may
                be a list of {"type": "text", "text": ...} too, which are joined.
            variables: the template's further ones.
            special: texts of special tokens, which are the template's to write.
            goes_on: leave out what the template writes behind the last message's text.
        """
        if not messages or not isinstance(messages, list | tuple):
            raise ValueError(f"a conversation must be a list of messages, got {messages!r}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"a chat message must be an object with a role, got {message!r}")
        messages = [_with_one_text(message) for message in messages]
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = ", ".join(self._sources)
            raise ValueError(
                f"{self._origin} has no chat template named 'default'; it has: {known}"
            )
        source = self._sources[name]
        given = {
            **(variables or {}),
            "documents": documents,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            line = json.dumps([source, given])
        except (TypeError, ValueError) as error:
            raise ValueError(f"what a chat template is given must be JSON: {error}") from None
        caller_text = self._caller_text(name, special)
        free = free_characters(line)
        marks = caller_text.choose_marks(free)
        characters = {mark: character for character, mark in marks.items()}
        end = ""
        if goes_on:
            end = next(free)
            characters[end] = ""
            given["messages"] = _with_end(messages, end)
        given = self._named_tokens | caller_text.mark(given, marks)
        answer = self._sandbox.ask({"source": source, "variables": given, "marks": characters})
        if "text" in answer:
            chat = RenderedChat(unescape_marks(answer["text"], characters), characters)
            return chat.up_to_mark(end, messages[-1]["content"]) if goes_on else chat
        problem = RenderedChat(answer["problem"], characters).text
        raise ValueError(f"chat template of {self._origin}: {' '.join(problem.split())}")

    def _caller_text(self, name: str, special: frozenset[str]) -> CallerText:
        if (name, special) not in self._caller_texts:
            # A template that cannot be parsed has none, and is refused when it is rendered.
            literals = self._sandbox.ask({"source": self._sources[name]}).get("literals", ())
            self._caller_texts[name, special] = CallerText(special, literals)
        return self._caller_texts[name, special]


def _with_end(messages: Sequence[Mapping[str, Any]], end: str) -> list[Mapping[str, Any]]:
    """The same with a mark at the end of the last one's text, and behind it a space: where a
    template has dropped this, it has dropped those of the text too.
    """
    *others, last = messages
    content = last.get("content")
    if not isinstance(content, str):
        raise ValueError(f"the last message cannot be continued: its content is {content!r:.100}")
    return [*others, {**last, "content": f"{content}{end} "}]


def _with_one_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list | tuple):
        return message
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if text is None or part.get("type") != "text" or not isinstance(text, str):
            raise ValueError(
                f'parts of a message must be {{"type": "text", "text": ...}}, got {part!r:.100}'
            )
        texts.append(text)
    return {**message, "content": "".join(texts)}


class _Sandbox:
    """`template_sandbox.serve` in a process; a new one behind one that ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(question)
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # what it has yet to answer is not the answer to the next
                self._process = None
                _end(process)
                raise
            if answer.endswith("\n"):
                return json.loads(answer)
            self._process = None
            process.stdout.close()
            status = process.wait()
        if status == -signal.SIGXCPU:
            return {"problem": "takes too long"}
        return {"problem": f"the process that renders it ended with status {status}"}

    def _start(self) -> subprocess.Popen[str]:
        # Where this process finds its modules.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from nano_vllm.tokenizer.template_sandbox import serve; serve()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
