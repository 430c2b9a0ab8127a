"""Where compiled kernels are kept: outside the package, one folder a version, and nothing but kernels is ever removed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("numba")
from numba.core import caching, config

from moekit.kernels.numba import _cache, _jit, _row_kernels

PYTHON = _cache.sys.implementation.cache_tag
FILES = ("a.nbi", "a.1.nbc", "a.2.nbc.tmp.0123")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache of our own, as ``NUMBA_CACHE_DIR`` gives one."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    _cache.folder.cache_clear()
    yield tmp_path / "moekit" / "kernels"
    _cache.folder.cache_clear()


def place(root: Path) -> Path:
    """This place's folder, before anything has used it."""
    found = _cache.folder().parent
    _cache.folder().rmdir()
    _cache.folder.cache_clear()
    return found


def filled(folder: Path, *more: str, hours: float = 25) -> Path:
    """Kernels that were last used so long ago."""
    folder.mkdir(parents=True)
    for name in (*FILES, *more):
        (folder / name).write_bytes(b"x")
    then = time.time() - hours * 3600
    os.utime(folder, (then, then))
    return folder


def test_kernels_are_kept_in_the_users_folder(root, monkeypatch):
    assert _cache.root() == root
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    assert _cache.root() == root / "moekit" / "kernels"


@pytest.mark.parametrize("value", ["", "sh", "./sh"])
def test_it_is_never_relative(root, monkeypatch, tmp_path, value):
    """Not even in the current folder: that of a clone has a moekit/kernels, which is the source's."""
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert _cache.root() == tmp_path / "home" / ".cache" / "moekit" / "kernels"
    monkeypatch.setenv("HOME", "here")  # nor is there another place to go to
    monkeypatch.setenv("USERPROFILE", "here")
    with pytest.raises(FileNotFoundError, match="the user has no home folder"):
        _cache.folder()


def test_a_relative_choice_stays_where_it_was_made(root, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "CACHE_DIR", "sh")
    monkeypatch.chdir(tmp_path)
    made = _cache.folder()
    assert made.is_relative_to(tmp_path / "sh" / "moekit" / "kernels") and made.is_absolute()
    filled(made.parent / f"{'0' * 12}-0.62.1-{PYTHON}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = _cache.kept()
    assert (found.folder, found.kernels, found.others) == (str(made), 0, 1)
    assert not [*Path().iterdir()]


def test_numba_is_told_of_it_for_this_package_alone(root):
    ours = caching.FunctionCache(_row_kernels.permute_kernel.__wrapped__)
    assert Path(ours.cache_path) == _cache.folder() and _cache.folder().parents[1] == root
    theirs = caching.FunctionCache(place)
    assert not Path(theirs.cache_path).is_relative_to(root)


def test_a_kernel_is_written_there_and_read_again(root):
    in_package = sorted((Path(_jit.__file__).parent / "__pycache__").glob("*.nb?"))
    made = [_row_kernels.permute_kernel.__wrapped__() for _ in range(2)]
    assert [sum(kernel.stats.cache_hits.values()) for kernel in made] == [0, 1]
    assert {path.suffix for path in _cache.folder().iterdir()} == {".nbi", ".nbc"}
    assert all(_cache._KERNEL.fullmatch(path.name) for path in _cache.folder().iterdir())
    assert sorted((Path(_jit.__file__).parent / "__pycache__").glob("*.nb?")) == in_package


def test_a_folder_that_another_process_has_cleared_costs_a_compilation(root):
    first = _row_kernels.permute_kernel.__wrapped__()
    _cache._remove(_cache.folder())
    assert not _cache.folder().exists()
    again = _row_kernels.permute_kernel.__wrapped__()
    assert sum(again.stats.cache_hits.values()) == 0 and again is not first and _cache.folder().exists()


def test_a_new_version_clears_those_unused_for_a_day(root):
    here = place(root)
    for old in (f"{'0' * 12}-0.62.1-{PYTHON}", f"{'1' * 12}-0.68.1rc1+cpu-{PYTHON}"):
        filled(here / old)
    mine = _cache.folder()
    assert [path.name for path in here.iterdir()] == [mine.name] and mine.name.endswith(f"-{PYTHON}")


def test_versions_in_use_at_one_path_leave_each_others_kernels(root, monkeypatch):
    """Containers with one home, or a clone that changes between branches."""
    here = place(root)
    other = filled(here / f"{'0' * 12}-0.62.1-{PYTHON}", hours=23)
    mine = filled(_cache.folder().parent / f"{'1' * 12}-0.62.1-{PYTHON}", hours=1000)
    monkeypatch.setattr(_cache, "_version", lambda: mine.name)
    _cache.folder.cache_clear()
    assert _cache.folder() == mine and time.time() - mine.stat().st_mtime < 3600  # used now, though nothing was written
    monkeypatch.setattr(_cache, "_version", lambda: f"{'2' * 12}-0.62.1-{PYTHON}")
    _cache.folder.cache_clear()
    _cache.folder()
    for folder in (mine, other):
        assert {path.name for path in folder.iterdir()} == set(FILES)


def test_what_is_anothers_is_left(root):
    """Another Python's kernels, another place's, files and folders of other names, and what a link leads to."""
    here, old = place(root), f"{'0' * 12}-0.62.1"
    kept = [
        filled(here / f"{old}-cpython-399"),
        filled(root / f"{'a' * 12}-{'b' * 12}" / f"{old}-{PYTHON}"),
        filled(here / "results"),
        filled(root / "models" / f"{old}-{PYTHON}"),
        filled(root.parent / f"{'c' * 12}-{'d' * 12}" / f"{old}-{PYTHON}"),
    ]
    mixed = filled(here / f"{'2' * 12}-0.62.1-{PYTHON}", "notes.txt")
    elsewhere = filled(root.parent / "elsewhere")
    (here / f"{'3' * 12}-0.62.1-{PYTHON}").symlink_to(elsewhere)
    _cache.folder()
    for folder in (*kept, elsewhere):
        assert {path.name for path in folder.iterdir()} == set(FILES), folder
    assert [path.name for path in mixed.iterdir()] == ["notes.txt"]


def test_a_place_that_nothing_has_used_for_a_month_is_cleared(root):
    place(root)
    other = filled(root / f"{'a' * 12}-{'b' * 12}" / f"{'0' * 12}-0.62.1-cpython-399").parent
    for days, left in ((29, True), (31, False)):
        then = time.time() - days * 24 * 3600
        os.utime(other, (then, then))
        _cache.folder.cache_clear()
        _cache.folder()
        assert other.exists() == left
        _cache.folder().rmdir()  # as if the next were new again
    assert _cache.folder().parent.exists()


def test_a_version_that_is_known_clears_nothing(root):
    mine = _cache.folder()
    old = filled(mine.parent / f"{'0' * 12}-0.62.1-{PYTHON}")
    then = time.time() - 40 * 24 * 3600
    os.utime(mine.parent, (then, then))
    _cache.folder.cache_clear()
    assert _cache.folder() == mine and old.exists()
    assert time.time() - mine.parent.stat().st_mtime < 3600  # and it is in use


def test_several_processes_at_once(root):
    """Whoever comes second finds less; none fails."""
    here = place(root)
    for i in range(5):
        filled(here / f"{i:012x}-0.62.1-{PYTHON}", *(f"{j}.nbc" for j in range(200)))
    with ThreadPoolExecutor(8) as pool:  # the undecorated function: each is a process that has not asked yet
        found = set(pool.map(lambda _: _cache.folder.__wrapped__(), range(8)))
    assert len(found) == 1 and [*here.iterdir()] == [*found]


def test_where_nothing_can_be_written_it_is_compiled_all_the_same(root, tmp_path, monkeypatch):
    (tmp_path / "moekit").write_text("a file where the folder would be")
    with pytest.raises(OSError):
        _cache.folder()
    in_package = sorted((Path(_jit.__file__).parent / "__pycache__").glob("*.nb?"))
    kernel = _row_kernels.permute_kernel.__wrapped__()
    assert len(kernel.signatures) == 1 and not kernel.stats.cache_hits
    assert sorted((Path(_jit.__file__).parent / "__pycache__").glob("*.nb?")) == in_package
