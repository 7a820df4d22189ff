"""Settings whose names only an optimizer's class knows: NAME=VALUE on the command line, a mapping in a recipe."""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec


def _value(text: str) -> Any:
    """A number, None, True, a tuple of such (0.9,0.99), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _spec(parse: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Mapping[str, Any]]:
    def pairs(words: Sequence[str]) -> dict[str, Any]:
        given = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not (equals and text and name.isidentifier()):
                raise ValueError(f"expected {metavar}, got {word!r}")
            given[name] = parse(text)
        return given

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=pairs,
        is_instance=lambda x: isinstance(x, Mapping),
        str_from_instance=lambda given: [typed({name: value}) for name, value in given.items()],
    )


OR_NONE = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default or 'none'})")
Values = Annotated[Mapping[str, Any], OR_NONE, _spec(_value, "NAME=VALUE")]
Lists = Annotated[
    Mapping[str, tuple[Any, ...]],
    OR_NONE,
    _spec(lambda t: tuple(map(_value, t.split(","))), "NAME=VALUE,VALUE"),
]


def typed(values: Mapping[str, Any]) -> str:
    """The mapping as it would be typed."""
    return " ".join(f"{name}={_text(value)}" for name, value in values.items())
