"""Chat templates: messages to text, rendered in a sandbox as transformers renders them, and within bounds.

A template is a program that came with someone's weights. Jinja's sandbox keeps it from Python's internals; here its
loops and calls are counted as well, and strings and lists may not grow beyond a bound where they are joined, repeated
or padded, since a sandboxed loop may still run for ever and a sandboxed string fill the memory.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, filters, nodes, parser, runtime, sandbox, utils, visitor

from epigone.errors import UserError

MOST_STEPS = 250_000
"""Loop iterations and calls of one rendering; real templates need some dozens a message."""

LONGEST = 2**24
"""Characters of a text, or items of a list, that a template may make."""

MOST_PARTS = 250_000
"""Parts of a value with all that is in it, each time that it is in it: a list may hold another many times."""

_PADDING = ("batch", "center", "format", "indent", "slice")
"""Filters whose result is as long as a number says."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry what was thought; templates read the first, one family the second."""


def render(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str], prompt: bool) -> str:
    """The text of the messages.

    Args:
        template: Jinja source.
        messages: each with a role and a content, as the template expects them.
        names: names of special tokens, such as bos_token, which templates read as variables.
        prompt: whether to end with what comes before an answer.

    Raises:
        UserError: the template refuses the messages, is no Jinja, or does what it must not.
    """
    try:
        compiled = _Environment().from_string(template)
        given = {"messages": [_message(message) for message in messages], "tools": None, "documents": None}
        text = ""
        for part in compiled.generate(**{**given, "add_generation_prompt": prompt, **names}):
            text = _bounded(text + part)
        return text
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"the chat template does what it must not: {_line(error)}") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read, line {error.lineno}: {_line(error)}") from error
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses these messages: {_line(error)}") from error
    except (OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"the chat template goes on too long: {_line(error) or type(error).__name__}") from error
    except Exception as error:  # a template can fail in any way in which Python can
        raise UserError(f"the chat template fails: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values alone, which have no methods that could do harm; what was thought, under every name."""
    plain = json.loads(json.dumps(dict(message)))
    thought = next((plain[name] for name in REASONING if plain.get(name) is not None), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with a count of what one template does."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self.steps = 0
        self.filters.update(tojson=_to_json, counted=self.counted, bounded=_bounded)
        self.filters.update({name: _guarded(self.filters[name]) for name in _PADDING})
        self.filters.update(sum=_sum, replace=_replace, join=_join)
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_refuse, strftime_now=_now, dict=_Dict(), namespace=_Namespace, range=self.range
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call(__self, __context: runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names are Jinja's, so that a template may call with an argument named `self`.
        __self.spend(1)
        name, text = getattr(__obj, "__name__", ""), getattr(getattr(__obj, "__wrapped__", __obj), "__self__", "")
        if name in ("format", "format_map"):
            _check_widths(text)
        elif name == "replace" and isinstance(text, str):
            return _replace(text, *args, **kwargs)
        elif name == "join" and isinstance(text, str):
            return _join(__self, args[0], text) if len(args) == 1 else super().call(__context, __obj, *args, **kwargs)
        _check_numbers(*args, *kwargs.values())
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            times, items = (left, right) if isinstance(left, int) else (right, left)
            _check(times * len(items))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * (abs(right) if operator == "**" else 1))
        elif operator == "%":
            _check_widths(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja's own is silent until the value is used.
        raise jinja2.exceptions.SecurityError(f"it reads '{attribute}' of a {type(obj).__name__}")

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise OverflowError(f"more than {MOST_STEPS} iterations and calls")

    def counted(self, items: Any) -> Any:
        """What a loop goes through; each item is a step."""
        items = items if hasattr(items, "__len__") else list(items)
        self.spend(len(items))
        return items

    def range(self, *args: int) -> range:
        numbers = sandbox.safe_range(*args)
        self.spend(len(numbers))
        return numbers


class _Bounds(visitor.NodeTransformer):
    """Puts loops, joined strings and lists, which no hook of the sandbox sees, behind filters that count them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "bounded", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self.visit_Concat(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self.visit_Concat(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_Concat(node) if node.ctx == "load" else self.generic_visit(node)


class _Generation(ext.Extension):
    """The tag around what a model wrote itself; transformers marks it when it trains, here it is only text."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of the instances, says Jinja)

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


class _Dict:
    """The name `dict` in a template: callable, and no type whose attributes lead anywhere."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(utils.Namespace):
    """A namespace that takes no name with an underscore before it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As Jinja's own: a template may make a namespace with a field named `self`.
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no field '{name}'")


def _check(size: int) -> None:
    if size > LONGEST:
        raise OverflowError(f"a value of more than {LONGEST} parts")


def _check_numbers(*values: Any) -> None:
    """Widths and counts for which a method or filter would make a string or list as long."""
    for value in values:
        if isinstance(value, int):
            _check(abs(value))


def _check_widths(form: Any) -> None:
    """Widths inside a format string; one that is an argument (`*`) is no template's business."""
    if isinstance(form, str):
        _check(max(map(int, re.findall(r"\d{1,12}", form)), default=0) if "%*" not in form else LONGEST + 1)


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        _check(len(value))
    parts, left = [value], MOST_PARTS
    while parts:
        part = parts.pop()
        if isinstance(part, list | tuple | dict):
            left -= len(part)
            if left < 0:
                raise OverflowError(f"a value of more than {MOST_PARTS} parts")
            parts += part.values() if isinstance(part, dict) else part
    return value


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, items: Any, attribute: str | int | None = None, start: float = 0) -> Any:
    """Of numbers: a sum of lists copies the first ones once for each of the others."""
    if not isinstance(start, int | float):
        raise TypeError("sum adds numbers alone")
    return filters.sync_do_sum(environment, items, attribute, start)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    times = text.count(old) if count < 0 else min(count, text.count(old))
    _check(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, items: Any, between: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        items = map(filters.make_attrgetter(environment, attribute), items)
    texts = [str(item) for item in items]
    _check(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def _guarded(filter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(filter)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        for value in args if filter.__name__ == "do_format" else ():
            _check_widths(value)
        return filter(*args, **kwargs)

    return guarded


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
