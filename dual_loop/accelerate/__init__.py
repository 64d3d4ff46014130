"""Levers that patch a library or compute the same faster; without this package the plain layers compute the same.

``build_model`` calls :func:`apply` once and nothing else of the package imports from here. A lever is a file with a
function ``apply(model, config)``. It sets instance attributes in place of the model's plain methods (``run_language``,
``step_language``, ``token_step``, ``repeated``, ``token_loss``, and ``encode``, ``finish``, ``level_width`` of
``model.grounding``), or changes the class of library layers. What needs loaded weights is appended to
``model.after_loading``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import NamedTuple

from dual_loop.config import Config
from dual_loop.errors import explain
from dual_loop.model.sa2va import Sa2VA

logger = logging.getLogger("dual_loop")


class Lever(NamedTuple):
    """One file of this package.

    Attributes:
        name: of the file; it is imported only where it is used.
        setting: the field of ``speed`` that switches it; None is always on.
        tested: of each library whose classes it changes, the first and the last minor version it was tested on.
    """

    name: str
    setting: str | None
    tested: Mapping[str, tuple[str, str]]


TRANSFORMERS = {"transformers": ("5.20", "5.23")}
LEVERS = (
    Lever("lora", "fused_lora", {"peft": ("0.21", "0.21")}),
    Lever("qwen2", None, TRANSFORMERS),
    Lever("sam2", "lean_sam2", TRANSFORMERS),
    Lever("decode_graph", None, {}),
    Lever("cpu", None, TRANSFORMERS),
    Lever("compile", "compile", {}),
    Lever("liger", "liger", {**TRANSFORMERS, "liger-kernel": ("0.8", "0.8")}),
)


def apply(model: Sa2VA, config: Config) -> None:
    """Pull every lever that ``config.speed`` asks for, in place.

    A library of an unknown version keeps its plain layers: one warning for each names the levers that are left out.
    """
    unknown: dict[tuple[str, str], list[str]] = {}
    for lever in LEVERS:
        if lever.setting is not None and not getattr(config.speed, lever.setting):
            continue
        problems = _unknown_versions(lever)
        if not problems:
            import_module(f"{__name__}.{lever.name}").apply(model, config)
        for problem in problems:
            unknown.setdefault(problem, []).append(lever.name)
    for (seen, expected), names in unknown.items():
        what = f"the plain layers are used instead of the faster ones of accelerate/{', '.join(names)}"
        logger.warning(explain(what, "speed.accelerate", seen, expected, "install a tested version"))


def replace(owner: object, *functions: Callable[..., object]) -> None:
    """Let ``owner`` call each of ``functions`` in place of its method of the same name; copies of it do so too."""
    for function in functions:
        setattr(owner, function.__name__, MethodType(function, owner))


def _unknown_versions(lever: Lever) -> list[tuple[str, str]]:
    """Return what is installed and what was tested, for the libraries of which these do not fit."""
    problems = []
    for library, (first, last) in lever.tested.items():
        try:
            seen = version(library)
        except PackageNotFoundError:
            continue  # the lever says so itself
        if not _minor(first) <= _minor(seen) <= _minor(last):
            problems.append((f"{library} {seen}", f"{library} {first} to {last}"))
    return problems


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
