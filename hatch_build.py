"""The README in a package's metadata: there is no folder beside it, so links to files of the repository become addresses.

Hatchling calls this while it builds (``[tool.hatch.metadata.hooks.custom]`` in pyproject.toml).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Of Markdown, ![alt](target) and [words](target), and of HTML, src="target" and the like. An address, #heading or a target
# of the root are left.
_LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\(|\b(?:src|srcset|href)=\")(?!\w+:|#|/)(?P<target>[^)\"\s]+)(?=[)\"])")
_PICTURE = re.compile(r"\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)


class ReadmeHook(MetadataHookInterface):
    """Sets ``readme``, which pyproject.toml lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called with the project's metadata as it stands."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        absolute = with_addresses(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute}


def with_addresses(text: str, repository: str) -> str:
    """``text`` with links to files as addresses of ``repository``: pages for reading, pictures as they are."""

    def address(link: re.Match[str]) -> str:
        target = link["target"].removeprefix("./")
        kind = "raw" if _PICTURE.search(target.split("#")[0]) else "tree" if target.endswith("/") else "blob"
        return f"{link['before']}{repository}/{kind}/main/{target}"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)  # every second one is code
    return "".join(part if i % 2 else _LINK.sub(address, part) for i, part in enumerate(parts))
