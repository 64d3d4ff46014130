"""How a setting is declared: a field of a dataclass that says what it does, its limits, and its flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")
MOST = 1e9
"""Limit of a number that states none; the lower one is 0 then."""
SHARE: Mapping[str, Any] = {"at_least": 0, "at_most": 1}


@dataclass(frozen=True)
class Setting:
    """What a field says about itself, beside type and default.

    Attributes:
        doc: what it does; the text of ``--help``.
        unit: a unit, or the kind of value; shown in place of the value.
        flag: name on the command line, without the dashes; empty for a setting that has no flag.
        title: group of ``--help``; empty: that of the field's class.
        choices: allowed words; with ``at_least`` a number counts too. Of a tuple, every item is one of them.
        at_least, at_most: limits of a number, themselves allowed.
    """

    doc: str
    unit: str = ""
    flag: str = ""
    title: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None

    def limits(self, kind: str) -> dict[str, float | None]:
        """Return the limits in a field whose type is written ``kind``: a number has some, stated or not."""
        low, high = (0, MOST) if "int" in kind or "float" in kind else (None, None)
        return {
            "at_least": low if self.at_least is None else self.at_least,
            "at_most": high if self.at_most is None else self.at_most,
        }


def setting(default: T, doc: str, unit: str = "", **about: Any) -> T:
    """Return a dataclass field with ``default`` that carries a :class:`Setting`."""
    metadata = {"setting": Setting(doc, unit, **about)}
    if isinstance(default, dict):
        return cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


def flag(default: T, doc: str, unit: str = "", name: str = "=", **about: Any) -> T:
    """Return a :func:`setting` that has a flag, called ``name``; ``=``: as the field itself."""
    return setting(default, doc, unit or ("" if "choices" in about else "NUMBER"), flag=name, **about)
