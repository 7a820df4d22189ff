"""Docstrings as Markdown: roles of reStructuredText become code, and a literal block follows a single colon."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`([^`]*)`")


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", obj.docstring.value), flags=re.MULTILINE)
