"""The facts, judged and put into words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moekit.doctor.system import EXTRAS, PACKAGES, too_old

# Writing fresh memory may take so many times as long as the same again before keep_pages is worth a word.
_FAULTS = 1.5


class Line(NamedTuple):
    """One line of the report."""

    label: str
    text: str
    style: str = ""  # of rich


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with what follows from them in front: ``ok``, ``problems`` and ``hints``."""
    problems, hints = list(_problems(found)), list(_hints(found))
    return {"ok": not problems, "problems": problems, "hints": hints, **found}


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    errors = dict(found["errors"])
    if "torch" in errors:
        absent = (found["versions"] or {}).get("torch") is None
        yield f"torch {'is not installed' if absent else 'cannot be used'}: {errors.pop('torch')}"
    for name in ("torch", "numba"):
        version, floor = (found["versions"] or {}).get(name), (found["requires"] or {}).get(name)
        if version and floor and too_old(version, floor):
            yield f"{name} {version} is too old: moekit needs {floor} or newer"
    for variable in found["environment"] or ():
        if variable["problem"]:
            yield variable["problem"]
    for name, why in (found["backends"] or {}).items():
        if why and "not installed" not in why:
            yield f"backend {name} {why}"
    if found["cache"] and found["cache"]["problem"]:
        yield f"kernels on disk: {found['cache']['problem']}"
    for trial in found["parity"] or ():
        if not trial["ok"]:
            how = trial["failed"] or f"off by {trial['error']:.2g} of the largest value, {trial['bound']:.2g} may be"
            yield f"{trial['operator']} by {trial['backend']} on {trial['device']}: {how}"
    for name, error in errors.items():
        yield f"{name}: could not be looked at: {error}"


def _hints(found: Mapping[str, Any]) -> Iterator[str]:
    pages = found["pages"]
    if pages and pages["fresh_ms"] > _FAULTS * pages["again_ms"] and "glibc" in found["versions"]["system"]:
        times = f"64 MiB take {pages['fresh_ms']:.0f} ms to fill, the same memory again {pages['again_ms']:.0f}"
        yield f"moekit.keep_pages() keeps freed memory in the process: fresh results cost page faults ({times})"
    if found["cache"] and found["cache"]["folder"] and found["cache"]["kernels"] <= found["cache"]["compiled"]:
        yield "moekit warmup compiles the usual CPU kernels ahead: 0.3 to 2 s each at a first call"
    for extra, (brings, package) in EXTRAS.items():
        if found["versions"] and found["versions"][package] is None:
            yield f"pip install 'moekit[{extra}]': {brings}"
    if found["gpus"] and (found["backends"] or {}).get("triton"):
        yield f"triton {found['backends']['triton']}: kernels for this GPU"


def lines(report: Mapping[str, Any]) -> Iterator[Line]:
    """The report as a reader wants it: what is wrong first, and one screen in all."""
    count = len(report["problems"])
    verdict = "all is well" if not count else f"{count} problem{'s' * (count > 1)}"
    yield Line("moekit doctor", verdict, "red" if count else "green")
    for problem in report["problems"]:
        yield Line("problem", problem, "red")
    parts = (_versions, _machine, _choices, _environment, _cache, _parity, _rates)
    for part in parts:
        yield from part(report)
    for hint in report["hints"]:
        yield Line("hint", hint, "yellow")


def _versions(report: Mapping[str, Any]) -> Iterator[Line]:
    versions = report["versions"]
    if not versions:
        return
    yield Line("versions", f"moekit {versions['moekit']}, Python {versions['python']}, {versions['system']}")
    build = f" ({report['torch_build']})" if report["torch_build"] else ""
    there = [f"{name} {versions[name]}{build if name == 'torch' else ''}" for name in PACKAGES if versions[name]]
    yield Line("", ", ".join(there))
    yield Line("", "not installed: " + (", ".join(name for name in PACKAGES if not versions[name]) or "none"), "dim")


def _machine(report: Mapping[str, Any]) -> Iterator[Line]:
    cpu, threads = report["cpu"], report["threads"]
    if cpu:
        share = f", {threads['threads']} threads, vectors {threads['vectors']}" if threads else ""
        memory = f", {cpu['memory_gib']:g} GiB" if cpu["memory_gib"] else ""
        yield Line("CPU", f"{cpu['model']}, {cpu['cores']} cores{share}{memory}")
        if cpu["instructions"]:
            yield Line("", " ".join(cpu["instructions"]), "dim")
    if report["gpus"] is not None:
        found = [f"{gpu['name']} ({gpu['architecture']}, {gpu['memory_gib']:g} GiB)" for gpu in report["gpus"]]
        yield Line("GPUs", ", ".join(found) or "none that torch sees")


def _choices(report: Mapping[str, Any]) -> Iterator[Line]:
    invalid = any(one["problem"] for one in report["environment"] or () if one["name"] == "MOEKIT_BACKEND")
    but = "; but with this MOEKIT_BACKEND every call raises" if invalid else ""
    for name, why in (report["backends"] or {}).items():
        if why:
            yield Line("backends", f"{name} {why}")
    for device, found in (report["auto"] or {}).items():
        groups: dict[tuple[str, str], list[str]] = {}
        for operator, choice in (found or {}).items():
            groups.setdefault((choice["backend"], choice["why"]), []).append(operator)
        for (backend, why), operators in groups.items():
            which = "every main operator" if len(groups) == 1 else ", ".join(operators)
            yield Line(f"auto, {device}", f"{backend} ({why}): {which}{but}", "red" if invalid else "")


def _environment(report: Mapping[str, Any]) -> Iterator[Line]:
    for variable in report["environment"] or ():
        value = "is not set" if variable["value"] is None else f"= {variable['value']}"
        means = "invalid, see above" if variable["problem"] else variable["meaning"]
        yield Line("environment", f"{variable['name']} {value}: {means}", "red" if variable["problem"] else "")


def _cache(report: Mapping[str, Any]) -> Iterator[Line]:
    cache = report["cache"]
    if cache and cache["folder"]:
        others = f"; {cache['others']} of other versions, {_mb(cache['others_bytes'])}" if cache["others"] else ""
        new = f" ({cache['compiled']} compiled just now)" if cache["compiled"] else ""
        kernels = f"{cache['kernels']} kernels{new}, {_mb(cache['kernels_bytes'])}{others}"
        folder = cache["folder"].replace(str(Path.home()), "~", 1)
        yield Line("kernels", f"{kernels}, in {folder}, which can be written")


def _parity(report: Mapping[str, Any]) -> Iterator[Line]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trial in report["parity"] or ():
        groups.setdefault((trial["device"], trial["backend"]), []).append(trial)
    for (device, backend), trials in groups.items():
        wrong = [trial["operator"] for trial in trials if not trial["ok"]]
        off = max((trial["error"] for trial in trials if trial["error"] is not None), default=0.0)
        right = f"ok: {', '.join(trial['operator'] for trial in trials)} (bfloat16, off by {off:.1g} at most)"
        yield Line(
            f"parity, {device}", f"{backend} {'WRONG: ' + ', '.join(wrong) if wrong else right}", "red" if wrong else ""
        )


def _rates(report: Mapping[str, Any]) -> Iterator[Line]:
    for device, found in (report["rates"] or {}).items():
        if found:
            shares = [f"{name} {100 * one['share']:.0f}%" for name, one in found["operators"].items()]
            copied = f"a copy moves {found['copy_gb_per_s']:.1f} GB/s; of that rate"
            yield Line(f"speed, {device}", f"{copied} {', '.join(shares)}{_busy(report)}")


def _busy(report: Mapping[str, Any]) -> str:
    """A word if others were at work already when this began."""
    cpu = report["cpu"] or {}
    load, cores = cpu.get("load") or 0, cpu.get("cores") or 1
    return f" (load {load:g} on {cores} cores: these figures mean little)" if load > cores / 2 else ""


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
