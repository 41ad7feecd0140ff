"""Chat templates: what real ones look like renders exactly, and a hostile one costs its time limit and no more."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refengine.errors import RequestError, TokenizerError
from refengine.tokenizer import chat, load_tokenizer
from refengine.tokenizer.chat import MAX_OUTPUT, MAX_TEMPLATE, render_chat_template
from tests.tokenizer.builder import CONTROL, bpe_file

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content + '<|eot_id|>' %}
    {% else %}
        {% set content = content + '<|eot_id|>' %}
    {% endif %}
{{ content }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PHI3 = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{ '<|user|>' + '\\n' + \
message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n' }}{% elif (message['role'] == 'assistant') %}\
{{ message['content'] + '<|end|>' + '\\n' }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}\
{% endfor %}"""

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi <b> & 'q' 🦙"},
    {"role": "assistant", "content": " Hello"},
    {"role": "user", "content": "Bye\n"},
]


@pytest.fixture(autouse=True, scope="module")
def no_process_left() -> Iterator[None]:
    yield
    chat._RENDERER.close()


def test_chatml_template_renders_exactly() -> None:
    assert render_chat_template(CHATML, TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi <b> & 'q' 🦙<|im_end|>\n"
        "<|im_start|>assistant\n Hello<|im_end|>\n"
        "<|im_start|>user\nBye\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    system = [{"role": "system", "content": "S"}]
    assert render_chat_template(CHATML, system, add_generation_prompt=False) == "<|im_start|>system\nS<|im_end|>\n"


def test_llama3_template_trims_blocks_as_on_the_hub() -> None:
    assert render_chat_template(LLAMA3, TALK[:2], variables={"bos_token": "<|begin_of_text|>"}) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi <b> & 'q' 🦙<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_phi3_template_renders_exactly_and_may_refuse() -> None:
    rendered = render_chat_template(PHI3, TALK, variables={"bos_token": "<s>"})
    assert rendered == (
        "<s><|user|>\nHi <b> & 'q' 🦙<|end|>\n<|assistant|>\n Hello<|end|>\n<|user|>\nBye\n<|end|>\n<|assistant|>\n"
    )
    with pytest.raises(TokenizerError, match="the template refuses these messages: only user and assistant"):
        render_chat_template(PHI3, [{"role": "system", "content": "x"}])


def test_hub_functions_are_there() -> None:
    template = (
        "{{ messages | tojson }}|{{ {'b': 1, 'a': '<é>'} | tojson(indent=1) }}|{{ strftime_now('%d') | length }}"
        "|{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}|{% generation %}g{% endgeneration %}|{{ tools is none }}|{{ effort | default('low') }}"
    )
    assert render_chat_template(template, [{"role": "user"}], variables={"effort": "high"}) == (
        '[{"role": "user"}]|{\n "b": 1,\n "a": "<é>"\n}|2|013|g|True|high'
    )


HOSTILE_IN_TIME = {
    "loops without output": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power in one step": "{{ 7 ** (7 ** 12) }}",
    "power of a power": "{% set x = 10 ** (10 ** 7) %}{% set y = x ** 1000 %}",
}


@pytest.mark.parametrize("name", HOSTILE_IN_TIME)
def test_template_that_runs_too_long_ends_at_its_limit(name: str) -> None:
    render_chat_template("started", [])
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=r"more than its time limit of 0\.3 s"):
        render_chat_template(HOSTILE_IN_TIME[name], [], time_limit_s=0.3)
    assert time.monotonic() - start < 5.0  # generous: the machine may be busy; without a limit they take days
    assert render_chat_template("{{ 1 + 1 }}", []) == "2"  # the next one is served


HOSTILE_IN_SPACE = {
    "string multiplied": ("{{ 'a' * 10**9 }}", "more memory"),
    "list multiplied": ("{{ ([0] * 10**9) | length }}", "more memory"),
    "padding": ("{{ 'a'.ljust(10**9) }}", "more memory"),
    "formatting": ("{{ '%1000000000d' % 1 }}", "more memory"),
    "replacing": ("{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}", "more memory"),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "more memory",
    ),
    "output in pieces": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", f"exceeds {MAX_OUTPUT} characters"),
    "output at once": (f"{{{{ 'a' * {MAX_OUTPUT + 1} }}}}", f"exceeds {MAX_OUTPUT} characters"),
    "huge range": ("{{ range(10**9) }}", "Range too big"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "long message": ("{{ raise_exception('x' * 10**7) }}", "refuses these messages: xxx"),
    "deep nesting": ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "RecursionError"),
}


@pytest.mark.parametrize("name", HOSTILE_IN_SPACE)
def test_template_that_grows_too_large_is_a_short_error(name: str) -> None:
    template, message = HOSTILE_IN_SPACE[name]
    with pytest.raises(TokenizerError) as caught:
        render_chat_template(template, [], time_limit_s=30.0)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("ok\n{% if %}", "line 2: Expected an expression"),
        ("{% include 'x' %}", "no loader"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_faulty_or_forbidden_template_is_one_clear_error(template: str, message: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template cannot be rendered: ") as caught:
        render_chat_template(template, [{"role": "user", "content": "x"}])
    assert message in str(caught.value)


def test_template_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(TokenizerError, match=f"has {MAX_TEMPLATE + 1} characters; the limit is {MAX_TEMPLATE}"):
        render_chat_template("x" * (MAX_TEMPLATE + 1), [])
    assert len(render_chat_template("x" * MAX_TEMPLATE, [])) == MAX_TEMPLATE


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of objects, not str"),
        ({"role": "user"}, "messages must be a list of objects, not dict"),
        (["hello"], r"messages\[0\] must be an object with a 'role'"),
        ([{"role": "user"}, {"content": "x"}], r"messages\[1\] must be an object with a 'role'"),
        ([{"role": "user", "content": {1, 2}}], "must be JSON-like"),
    ],
)
def test_messages_of_the_wrong_shape_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render_chat_template("x", messages)


def test_renderer_that_dies_is_replaced() -> None:
    assert render_chat_template("a", []) == "a"
    process = chat._RENDERER._process
    assert process is not None
    process.kill()
    process.wait()
    assert render_chat_template("b", []) == "b"


class Late(threading.Timer):
    """A limit that passes just after the reply was read."""

    def run(self) -> None:
        self.finished.wait()
        self.function()


def test_reply_at_the_very_end_of_its_time_stands_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        with monkeypatch.context() as late:
            assert render_chat_template("started", []) == "started"  # so that only a reply is late
            late.setattr(threading, "Timer", Late)
            assert render_chat_template(f"late {i}", []) == f"late {i}"
        assert render_chat_template(f"next {i}", []) == f"next {i}"


def test_tokenizer_fills_in_its_own_special_tokens(tmp_path: Path) -> None:
    gguf = bpe_file(
        tmp_path / "v.gguf",
        special={"<s>": CONTROL, "<|end|>": CONTROL},
        ids={"bos_token_id": 256, "eos_token_id": 257},
        flags={"add_bos_token": True},
        chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}{{ extra }}",
    )
    tokenizer = load_tokenizer(gguf)
    assert tokenizer is not None
    text = tokenizer.render_chat([{"role": "user", "content": "a"}], variables={"extra": "!"})
    assert text == "<s>a<|end|>!"
    assert tokenizer.encode(text, add_special=False, parse_special=True) == [256, 97, 257, 33]


def test_model_without_template_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_file(tmp_path / "v.gguf"))
    assert tokenizer is not None
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match="the model has no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])


def test_templates_of_real_vocabularies_render_to_ids_that_decode_back(shared_data: Path) -> None:
    from refengine.gguf.file import GGUFFile

    tokenizer = load_tokenizer(GGUFFile(shared_data / "vocab" / "ggml-vocab-phi-3.gguf"))
    assert tokenizer is not None
    ids = tokenizer.encode(tokenizer.render_chat(TALK[:1]), add_special=False, parse_special=True)
    assert ids[:2] == [1, 32010]
    assert ids[-2:] == [32007, 32001]
    assert tokenizer.decode(ids) == "<s><|user|>Hi <b> & 'q' 🦙<|end|><|assistant|>"
