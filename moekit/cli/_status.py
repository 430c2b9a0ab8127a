"""Exit statuses that commands share."""

from __future__ import annotations

INTERRUPTED = 130  # by Ctrl-C, as shells have it
