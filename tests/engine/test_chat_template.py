"""Templates as published models have them: to the last space what transformers makes of them."""

from datetime import UTC, datetime

import jinja2
import pytest

from ingine.engine.text.chat_template import ChatTemplate
from tests.tiny_models import make_tokenizer

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
NOW = datetime(2024, 2, 29, 23, 59, tzinfo=UTC)

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "  What is 2 < 3 & 'so on'?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue."}
CONVERSATIONS = {
    "question": [QUESTION],
    "with a system prompt": [SYSTEM, QUESTION],
    "several turns": [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": "日本 {{ x }} {% if %}"}],
}

TEMPLATES = {
    # Llama 3: a default for the date, the system prompt cut off the messages, trimmed contents.
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y")[:2] %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # Qwen 2.5 and 3: a branch for tools, loop variables, a namespace, the last turn searched for backwards.
    "qwen": """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and message.content is string %}
        {%- set ns.looking = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last_query_index %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    # Mistral: roles that must alternate, both special tokens.
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('the roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    # Without dashes: blocks leave their own lines and indentation out all the same.
    "whitespace": """
  {% for message in messages %}
    {% if message.role == 'user' %}
  user: {{ message.content }}
    {% endif %}
  {% endfor %}

{# a comment #}
  {% if true %}a{% endif %}
""",
    "loop controls": (
        "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{{ message.content }}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
    ),
    # The assistant's words marked for training; what is set inside stays inside.
    "generation": (
        "{% set turn = 'no' %}{% for message in messages %}{% if message.role == 'assistant' %}"
        "{%- generation %}{% set turn = 'yes' %}{{ turn }}: {{ message.content }}\n{%- endgeneration %}"
        "{% else %}{{ turn }}: {{ message.content }}{% endif %}{% endfor %}{{ turn }}"
    ),
    "json": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<&>'} | tojson }}"
        "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
    ),
    "dict and namespace": (
        "{% set d = dict(a=1, b=[2]) %}{{ d }}{{ dict.fromkeys(['x'], 0) }}"
        "{{ dict([('k', 'v')]).items() | list }}"
        "{% set ns = namespace({'n': 1}, self=2) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.self }}"
    ),
    "macros": (
        "{% macro turn(role, content) %}<|im_start|>{{ role }}\n{{ content | default('') }}{{ eos_token }}\n"
        "{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{{ turn(m.nothing, m.x) }}"
        "{% endfor %}"
    ),
    "variables": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ tools }}{{ documents }}{{ nothing }}"
        "{{ '{0.__class__} {0}'.format('x') }}"
    ),
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_gives_what_transformers_gives(template, messages):
    theirs = make_tokenizer(template)
    theirs.bos_token = SPECIAL_TOKENS["bos_token"]
    assert theirs.special_tokens_map == SPECIAL_TOKENS
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(template, SPECIAL_TOKENS).render(messages, NOW) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ raise_exception.__closure__[0] }}",
        "{{ raise_exception('no') }}",
        "{{ nothing.at_all }}",
        "{{ messages | tojson(nonsense=1) }}",
        "{% if %}",
        "{% include 'a' %}",
    ],
)
def test_what_transformers_refuses_is_refused_in_the_same_way(template):
    """The sandbox matters most, since a template comes from the publisher of the model."""
    with pytest.raises(Exception) as theirs:
        make_tokenizer(template).apply_chat_template([QUESTION], tokenize=False)
    with pytest.raises(type(theirs.value)):
        ChatTemplate(template, SPECIAL_TOKENS).render([QUESTION], NOW)


@pytest.mark.parametrize(
    "template", ["{{ namespace(_x=1) }}", "{% set ns = namespace() %}{% set ns.__class__ = 1 %}"]
)
def test_a_namespace_has_no_names_that_python_uses(template):
    """Recent versions of transformers refuse them, too."""
    with pytest.raises(jinja2.exceptions.SecurityError, match="no attribute '_"):
        ChatTemplate(template, {}).render([QUESTION], NOW)


def test_a_template_is_told_the_given_time():
    template = ChatTemplate("{% macro m() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ m() }}", {})
    assert template.render([QUESTION], NOW) == "29 Feb 2024"


def test_keys_without_a_value_are_left_out():
    template = ChatTemplate("{{ 'name' in messages[0] }}", {})
    assert template.render([QUESTION | {"name": None}], NOW) == "False"
    assert template.render([QUESTION | {"name": "Jo"}], NOW) == "True"


def test_a_template_sees_no_objects_of_ours():
    with pytest.raises(TypeError, match="not JSON serializable"):
        ChatTemplate("{{ messages }}", {}).render([{"role": "user", "content": object()}], NOW)


def test_a_template_that_is_broken_shows_when_it_is_used():
    template = ChatTemplate("{% if %}", {})
    with pytest.raises(jinja2.TemplateSyntaxError):
        template.render([QUESTION], NOW)
