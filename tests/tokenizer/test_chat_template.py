from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nano_vllm.tokenizer.chat_template import ChatTemplate

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & ü?"},
    {"role": "assistant", "content": "Yes."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<ü>", "parameters": {}}}]


def render(source: Any, **options: Any) -> str:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, tokens, "the model").render(CHAT, **options).text


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}\n  [{{ m.role }}] {{ m['content'] | trim }}\n"
        "  {% endfor %}\n{% if add_generation_prompt %}assistant:{% endif %}",
        "{%- for m in messages -%}{%- if loop.first %}{% continue %}{% endif -%}"
        "{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{%- endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages[1].content | tojson }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ documents is none }}{{ missing is defined }}",
        "{{ strftime_now('%Y') }}",
        "{{ messages[0].content.split(' ')[-1].upper() }}{{ '%05.1f' | format(2.25) }}",
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(template: str, prompt: bool) -> None:
    (expected,), _ = render_jinja_template(
        [CHAT],
        tools=TOOLS,
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert render(template, add_generation_prompt=prompt, tools=TOOLS) == expected


def test_variables_of_the_caller() -> None:
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"


def test_named_templates() -> None:
    named = {"default": "plain", "tool_use": "tools"}
    assert render(named) == "plain"
    assert render(named, tools=TOOLS) == "tools"
    with pytest.raises(ValueError, match="no chat template named 'default'; it has: rag"):
        render({"rag": "x"})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "the model: roles must alternate$"),
        ("{% if %}", "line 1: "),
        ("x\n{% nonsense %}", "line 2: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_errors_take_one_line(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        render(template)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("chat template of the model: ")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_sandbox(template: str) -> None:
    with pytest.raises(ValueError, match="chat template of the model"):
        render(template)
    assert len(CHAT) == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too"),
        ("{{ 9 ** (9 ** 9) }}", "takes too long"),
        ("{{ 'x' * 10 ** 12 }}", "needs more than 1073741824 bytes of memory"),
        ("{{ '%999999999999d' % 1 }}", "needs more than"),
        ("{{ 'x' | center(10 ** 10) }}", "needs more than"),
        (
            "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}"
            "{% endfor %}",
            "(needs more than|takes too long)",  # which comes first is the machine's
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", ""),
    ],
)
def test_templates_made_to_harm(template: str, message: str) -> None:
    start = time.monotonic()
    harmful = ChatTemplate({"default": template, "tool_use": "fine"}, {}, "the model")
    with pytest.raises(ValueError, match=f"^chat template of the model: .*{message}") as error:
        harmful.render(CHAT)
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    assert harmful.render(CHAT, tools=TOOLS).text == "fine"  # nothing is left behind


def test_an_interrupted_conversation_answers_no_other() -> None:
    """A Ctrl-C while the template is rendered: what comes of it is dropped."""
    template = ChatTemplate("{{ messages[0].content }}", {}, "the model")
    assert template.render([{"role": "user", "content": "a"}]).text == "a"
    process = template._sandbox._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "b"}])
    process.send_signal(signal.SIGCONT)
    assert template.render([{"role": "user", "content": "c"}]).text == "c"


def test_only_json_reaches_a_template() -> None:
    with pytest.raises(ValueError, match="must be JSON: Object of type object"):
        render("x", variables={"thing": object()})


def test_parts_of_text_are_one() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "the model")
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    message = {"role": "user", "content": parts}
    assert template.render([message]).text == "a b"
    assert message["content"] is parts
    for bad in ({"type": "image_url", "image_url": "x"}, {"type": "text"}, "a", {"text": "a"}):
        with pytest.raises(ValueError, match=r"parts of a message must be .* got ") as error:
            template.render([{"role": "user", "content": [bad]}])
        assert repr(bad)[:20] in str(error.value)


@pytest.mark.parametrize("message", ["hi", {"content": "x"}, {"role": 3}, None])
def test_messages_need_roles(message: Any) -> None:
    with pytest.raises(ValueError, match="must be an object with a role"):
        ChatTemplate("x", {}, "the model").render([message])
