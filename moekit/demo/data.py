"""Text for the demo, split by file into training and held-out, and the byte bigram model that it has to beat."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moekit.demo import DemoError

# One file in ten is held out.
_HELDOUT_SHARE = 10
# Installed packages are not the standard library. Its tests are twice its size, and distributions leave them out.
_STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# More than any run of the demo trains on; what lies beyond it, in path order, is left unread.
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Corpus:
    """Bytes of training and held-out files.

    Attributes:
        source: what was read, in words.
        train: ``[N]`` uint8.
        heldout: ``[M]`` uint8.
        train_files: names, relative to what was read.
        heldout_files: likewise; the same name as in training only for a single file, split at a byte.
    """

    source: str
    train: Tensor
    heldout: Tensor
    train_files: tuple[str, ...]
    heldout_files: tuple[str, ...]


def load_corpus(path: Path | None = None) -> Corpus:
    """Read the standard library's source, or any folder or file of text.

    A folder's files are split by a hash of their relative path, so that a file stays on its side whatever the others
    are. A single file is cut: its last tenth is held out.

    Raises:
        DemoError: a path that does not exist, cannot be read or holds too little text.
    """
    try:
        if path is None:
            root = Path(sysconfig.get_paths()["stdlib"])
            return _split_files(f"Python's standard library ({root})", _stdlib_files(root))
        if path.is_dir():
            return _split_files(f"--data {path}", _text_files(path))
        return _split_bytes(path)
    except OSError as error:
        raise DemoError(f"text cannot be read: {error}") from error


def _stdlib_files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _STDLIB_SKIPPED.isdisjoint(name.parts):
            yield name.as_posix(), _read(path)


def _text_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Files that are not hidden and hold text: UTF-8 or another encoding without NUL bytes."""
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            content = _read(path)
            if content and b"\0" not in content:
                yield name.as_posix(), content


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def is_heldout(name: str) -> bool:
    """Whether the file of this relative path is held out: one in ten, by a hash that no run or machine changes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _HELDOUT_SHARE == 0


def _split_files(source: str, files: Iterator[tuple[str, bytes]]) -> Corpus:
    sides: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    total = 0
    for name, content in files:
        total += len(content)
        if total > _MAX_BYTES:
            source += f", its first {_MAX_BYTES // 2**20} MiB"
            break
        sides[is_heldout(name)][name] = content
    train, heldout = sides
    if not heldout and len(train) > 1:  # few files, and the hash spared them all
        last = max(train)
        heldout[last] = train.pop(last)
    elif not train and len(heldout) > 1:
        first = min(heldout)
        train[first] = heldout.pop(first)
    if not train or not heldout:
        raise DemoError(f"{source}: expected at least 2 files of text, got {len(train) + len(heldout)}")
    train_bytes, heldout_bytes = (_as_tensor(b"".join(side.values())) for side in sides)
    return Corpus(source, train_bytes, heldout_bytes, tuple(train), tuple(heldout))


def _split_bytes(path: Path) -> Corpus:
    content = _read(path)
    if b"\0" in content:
        raise DemoError(f"--data {path}: expected text, got a binary file")
    cut = len(content) - len(content) // _HELDOUT_SHARE
    if cut == len(content):
        raise DemoError(f"--data {path}: expected text, got {len(content)} bytes")
    train, heldout = _as_tensor(content[:cut]), _as_tensor(content[cut:])
    return Corpus(f"{path} (its last tenth held out)", train, heldout, (path.name,), (path.name,))


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def training_batch(train: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """Windows at random places: ``[B, C + 1]`` int64, inputs and the byte after each."""
    starts = torch.randint(len(train) - context, (batch, 1), generator=generator)
    return train[starts + torch.arange(context + 1)].long()


def heldout_windows(heldout: Tensor, count: int, context: int) -> Tensor:
    """Up to ``count`` windows that do not overlap, evenly spaced: ``[N, C + 1]`` int64. The same ones every time."""
    count = min(count, (len(heldout) - 1) // context)
    starts = torch.linspace(0, len(heldout) - context - 1, count, dtype=torch.float64).long().unsqueeze(1)
    return heldout[starts + torch.arange(context + 1)].long()


def check_enough(corpus: Corpus, context: int) -> None:
    """Both sides must hold a window.

    Raises:
        DemoError: one holds less.
    """
    for side, content in (("training", corpus.train), ("held-out", corpus.heldout)):
        if len(content) <= context:
            raise DemoError(
                f"{corpus.source}: expected more than {context} bytes of {side} text (one window), got {len(content)}"
            )


class Bigram:
    """Add-one smoothed byte bigram model: ``p(b | a) = (count(a, b) + 1) / (count(a) + 256)``."""

    def __init__(self, train: Tensor) -> None:
        pairs = train[:-1].long() * 256 + train[1:].long()
        counts = torch.bincount(pairs, minlength=256 * 256).view(256, 256).double()
        self.log_probs = torch.log2((counts + 1) / (counts.sum(1, keepdim=True) + 256))

    def bits_per_byte(self, windows: Tensor) -> float:
        """Mean over every byte of ``windows [N, C + 1]`` but each one's first, which has no byte before it."""
        return -self.log_probs[windows[:, :-1], windows[:, 1:]].mean().item()


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
