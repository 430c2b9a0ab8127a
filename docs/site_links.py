"""Links to files that are no pages: on the site they are names, as nothing there says where the repository is."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[`?([^\]`]+)`?\]\((?:\.\./)+(?:examples|moekit|benchmarks|tests)/[^)\s]*\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for every page."""
    return OUTSIDE.sub(r"`\1`", markdown)
