import json
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from epigone.data import chat
from epigone.errors import UserError

MESSAGES = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "What is <b>this</b> & 'that'?\n\n  世界 🙂"},
    {"role": "assistant", "content": "A test.", "reasoning_content": "hm"},
    {"role": "user", "content": "Thanks", "extra": {"b": [1, 2.5, None, True], "a": "é"}},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
    "whitespace": """
    {%- if messages[0]['role'] == 'system' %}
        {%- set system = messages[0]['content'] | trim %}
        {%- set rest = messages[1:] %}
    {%- endif %}
    {{ bos_token }}
    {% for message in rest %}
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{ raise_exception('roles must alternate') }}
        {% endif %}
        {# a comment #}
        [{{ message.role | upper }}] {{ message.content.strip().split('\\n')[0] ~ loop.index }}
        {%- if loop.last %} END{% endif %}
    {% endfor %}
    """,
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }},"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages[3].extra | tojson(indent=2) }}|"
    "{{ 'é<&>' | tojson(ensure_ascii=True) }}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages[::-1] %}"
    "{% set ns.n = ns.n + m.content|length %}"
    "{% set ns.text = ns.text ~ m.role[0] ~ '/' %}{% endfor %}{{ ns.n }} {{ ns.text }} {{ dict(a=1) | tojson }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "macro": "{% macro tag(name, text) %}<{{ name }}>{{ caller() if caller else text }}</{{ name }}>{% endmacro %}"
    "{% for m in messages recursive %}{{ tag(m.role, m.content | e) }}{% endfor %}",
    "undefined": "{% if tools is defined and tools is none and not documents %}none{% endif %}"
    "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ messages[1].missing or 'default' }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }} {{ range(3) | list }} {{ 'a\nb' | indent(4) }} "
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'x' * 3 }} {{ 2 ** 10 }} "
    "{{ '%s! %5d' % ('y', 7) }} {{ '%s' | format(7) }} {{ '{:>5}'.format(3) }} "
    "{{ 'abc'.center(9, '.') }} {{ messages[3].extra.items() | list }} {{ 7 // 2 }} {{ [1, 2] + [3] }} "
    "{{ [1, 2] | sum }} {{ messages | map(attribute='role') | map('length') | sum(start=3) }} "
    "{{ 'aba' | replace('a', 'c', 1) }} "
    "{{ 'aba'.replace('a', 'c') }} {{ ', '.join(['a', 'b']) }} {{ messages | join('/', attribute='role') }} "
    "{% for k, v in {'a': (1, 2), 'b': (3, 4)}.items() %}{{ k }}{{ v[0] }}{% endfor %}{% set a, b = 1, 2 %}{{ a + b }}",
    "thinking": "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.thinking or '' }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_are_rendered_as_transformers_renders_them(name, prompt):
    (expected,), _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **NAMES
    )
    assert chat.render(TEMPLATES[name], MESSAGES, NAMES, prompt) == expected
    assert expected


def test_the_time_is_that_of_the_clock():
    shown = chat.render("{{ strftime_now('%Y') }}", MESSAGES, NAMES, True)
    assert abs(int(shown) - time.gmtime().tm_year) <= 1


def test_messages_are_not_changed():
    before = json.dumps(MESSAGES)
    chat.render(TEMPLATES["thinking"], MESSAGES, NAMES, True)
    assert json.dumps(MESSAGES) == before


MUST_NOT = "does what it must not"
TOO_LONG = "goes on too long"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__ }}", MUST_NOT),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", MUST_NOT),
        ("{{ messages['__class__'].__init__ }}", MUST_NOT),
        ("{{ (messages | attr('__class__')).x }}", MUST_NOT),
        ("{{ raise_exception.__globals__['json'] }}", MUST_NOT),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", MUST_NOT),
        ("{{ messages.append(1) }}", MUST_NOT),
        ("{{ messages[0].update(a=1) }}", MUST_NOT),
        ("{{ '{0.__class__}'.format(1) }}", MUST_NOT),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", MUST_NOT),
        ("{{ namespace(__init__=1) }}", MUST_NOT),
        ("{% include '/etc/passwd' %}", "fails: TypeError"),
        ("{% for i in range(10**9) %}x{% endfor %}", TOO_LONG),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TOO_LONG),
        ("{% set s = 'abcdefgh' * 1000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}", TOO_LONG),
        ("{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}", TOO_LONG),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", TOO_LONG),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}", TOO_LONG),
        ("{{ 'x' * 10**10 }}", TOO_LONG),
        ("{{ 10**10 * [1] }}", TOO_LONG),
        ("{{ 10 ** (10 ** 10) }}", TOO_LONG),
        ("{% set ns = namespace(s='xy') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", TOO_LONG),
        ("{% set ns = namespace(s='xy') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", TOO_LONG),
        ("{% set s = 'x' * 10**6 %}{% for i in range(99) %}{{ s }}{% endfor %}", TOO_LONG),
        ("{{ 'x'.center(10**10) }}", TOO_LONG),
        ("{{ 'x' | center(10**10) }}", TOO_LONG),
        ("{{ 'x\ny' | indent(10**10) }}", TOO_LONG),
        ("{{ '%10000000000d' % 1 }}", TOO_LONG),
        ("{{ '%*d' % (10**10, 1) }}", TOO_LONG),
        ("{{ '%10000000000d' | format(1) }}", TOO_LONG),
        ("{{ '{:>10000000000}'.format(1) }}", TOO_LONG),
        ("{{ '{:>{}}'.format(1, 10**10) }}", TOO_LONG),
        ("{{ lipsum(n=10**9) }}", TOO_LONG),
        ("{{ lipsum() }}", "refuses these messages: 'lipsum' is undefined"),
        ("{{ ([[1] * 10000] * 10000) | sum(start=[]) }}", TOO_LONG),
        ("{{ [[1], [2]] | sum(start=[]) }}", "fails: TypeError"),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}", TOO_LONG),
        ("{% set ns = namespace(x=(1,)) %}{% for i in range(40) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}", TOO_LONG),
        (
            "{% set ns = namespace(x=1) %}{% for i in range(40) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
            TOO_LONG,
        ),
        (
            "{% set ns = namespace(x=1) %}{% for i in range(40) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
            TOO_LONG,
        ),
        ("{{ ('a' * 30000).replace('a', 'b' * 100000) }}", TOO_LONG),
        ("{{ ('a' * 30000) | replace('a', 'b' * 100000) }}", TOO_LONG),
        ("{{ ('a' * 100000).join(['x'] * 30000) }}", TOO_LONG),
        ("{{ (['x'] * 30000) | join('a' * 100000) }}", TOO_LONG),
        ("{% for m in messages %}", "cannot be read, line 1"),
        ("{{ messages | nothing }}", "cannot be read, line 1"),
        ("{{ raise_exception('no system message\nplease') }}", "refuses these messages: no system message"),
        ("{{ nothing.at.all }}", "refuses these messages: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "fails: TypeError"),
    ],
)
def test_what_a_template_must_not_do_is_one_line_and_soon(template, message):
    start = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        chat.render(template, MESSAGES, NAMES, True)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def test_messages_that_are_no_json_are_one_line():
    with pytest.raises(UserError, match="fails: TypeError"):
        chat.render(TEMPLATES["chatml"], [{"role": "user", "content": object()}], NAMES, True)
