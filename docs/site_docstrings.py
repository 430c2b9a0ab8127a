"""Docstrings as the site's Markdown wants them: roles become links, and ``::`` announces a block of code no more."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Of a name that has no place on the site only the name is left.
LINK = r'<autoref identifier="\1" optional><code>\1</code></autoref>'


def as_markdown(text: str) -> str:
    """The text of a docstring."""
    text = re.sub(r":(?:func|class|meth|mod|attr|data):`~?\.?([^`]+)`", LINK, text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)::$\n", r"\1\n", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is found."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
