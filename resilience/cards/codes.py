"""Fault codes: what a vendor's code means, and what it asks for. Read from data files, the user's over ours.

Owns the form of those files (docs/cards.md) and refuses malformed ones by file, key and what is allowed. An unknown
code is no error: it is watched. ``python -m resilience.cards.codes`` prints the tables of docs/cards.md.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from resilience.control.faults import Action
from resilience.errors import InvalidError

VARIABLE = "RESILIENCE_FAULT_CODES"
FILES = ("nvidia", "ascend", "simulated")
_TABLES = ("sources", "codes")
_KEYS = ("name", "level", "action", "limit", "source")
_ACTIONS = [action.value for action in Action]
_XID = re.compile(r"xid[\s:-]*(\d+)", re.IGNORECASE)
_HEX = re.compile(r"(?:0x)?([0-9a-f]{8})", re.IGNORECASE)


@dataclass(frozen=True)
class Code:
    """One entry.

    Attributes:
        name: what it means, in a few words; empty where no public text says.
        level: the vendor's own word for what is to be done.
        limit: the ``limit``-th time within 24 h on one card, the card is replaced; ``None`` = never.
        source: where that is from.
    """

    code: str
    action: Action
    name: str = ""
    level: str = ""
    limit: int | None = None
    source: str = ""


class FaultCodes:
    """Codes of all vendors (an XID and an Ascend code cannot be mistaken for each other), and overrides."""

    def __init__(self, codes: Mapping[str, Code]) -> None:
        self._codes = dict(codes)

    @classmethod
    def over(cls, overrides: Mapping[str, Mapping[str, Any]]) -> FaultCodes:
        """Ours, with ``overrides`` (as ``read_overrides`` returns them) in their place."""
        codes = dict(_shipped())
        for code, entry in overrides.items():
            codes[code] = _merged(codes.get(code), code, entry)
        return cls(codes)

    def find(self, code: str) -> Code | None:
        """The entry of ``code`` in any usual spelling (``79``, ``XID 79``, ``0x80e01801``); ``None``: unknown."""
        return self._codes.get(normal(code))

    def __iter__(self) -> Any:
        return iter(self._codes.values())


def normal(code: str) -> str:
    """``code`` as the data files spell it."""
    text = code.strip()
    if xid := _XID.fullmatch(text):
        return str(int(xid[1]))
    if found := _HEX.fullmatch(text):
        return found[1].upper()
    return text.lower()


def read_overrides(path: str | None) -> dict[str, dict[str, Any]]:
    """The user's file as plain data, code → entry; empty for no path.

    Raises:
        InvalidError: the file cannot be read, or something in it is not allowed.
    """
    if not path:
        return {}
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(
            f"the file of fault codes cannot be read: {error}",
            operation="fault codes",
            path=path,
            hint=f"give the path of a TOML file, in {VARIABLE} or as fault_codes=, or neither",
        ) from error
    return _parse(text, path)


def _parse(text: str, path: str) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _refused(
            path, "the file", f"is no TOML: {error}", "see docs/cards.md for an example"
        ) from error
    for table, content in document.items():
        if table not in _TABLES:
            raise _refused(path, table, "is not known", _near(table, _TABLES))
        if not isinstance(content, dict):
            raise _refused(path, table, "is no table", f"write [{table}]")
    sources = document.get("sources", {})
    entries: dict[str, dict[str, Any]] = {}
    for code, entry in document.get("codes", {}).items():
        key = f"codes.{code}"
        if not isinstance(entry, dict):
            raise _refused(path, key, "is no table", f'write {code} = {{ action = "{_ACTIONS[0]}" }}')
        if normal(code) in entries:
            raise _refused(path, key, "is there twice, in two spellings", "keep one of them")
        entries[normal(code)] = _entry(entry, key, path, sources)
    return entries


def _entry(entry: dict[str, Any], key: str, path: str, sources: dict[str, Any]) -> dict[str, Any]:
    for name, value in entry.items():
        where = f"{key}.{name}"
        if name not in _KEYS:
            raise _refused(path, where, "is not known", _near(name, _KEYS))
        if name == "action" and value not in _ACTIONS:
            raise _refused(path, where, f"= {value!r} is not allowed", _near(str(value), _ACTIONS))
        if name == "limit":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _refused(path, where, f"= {value!r} is not allowed", "give an integer >= 1")
        elif not isinstance(value, str):
            raise _refused(path, where, f"= {value!r} is not allowed", "give a string")
    if "action" not in entry:
        raise _refused(path, f"{key}.action", "is missing", f"give one of: {', '.join(_ACTIONS)}")
    source = entry.get("source", "")
    return {**entry, "source": str(sources.get(source, source)) or path}


def _merged(ours: Code | None, code: str, entry: Mapping[str, Any]) -> Code:
    name = entry.get("name", ours.name if ours else "")
    level = entry.get("level", ours.level if ours else "")
    return Code(code, Action(entry["action"]), name, level, entry.get("limit"), entry.get("source", ""))


@cache
def _shipped() -> Mapping[str, Code]:
    codes: dict[str, Code] = {}
    for name in FILES:
        text = (resources.files("resilience.cards") / "codes" / f"{name}.toml").read_text()
        for code, entry in _parse(text, f"{name}.toml").items():
            codes[code] = _merged(None, code, entry)
    return codes


def _near(given: str, allowed: Any) -> str:
    near = difflib.get_close_matches(given, allowed, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"allowed: {', '.join(allowed)}"


def _refused(path: str, key: str, wrong: str, hint: str) -> InvalidError:
    return InvalidError(f"{path}: {key} {wrong}", operation="fault codes", path=path, hint=hint)


def tables() -> str:
    """The tables of docs/cards.md: every code with a name, and how many more there are by level."""
    lines = []
    for name, title in (("nvidia", "NVIDIA"), ("ascend", "Ascend")):
        text = (resources.files("resilience.cards") / "codes" / f"{name}.toml").read_text()
        document = tomllib.loads(text)
        lines += [f"### {title}", "", "| action | codes |", "|---|---|"]
        for action in reversed(_ACTIONS):
            entries = {c: e for c, e in document["codes"].items() if e["action"] == action}
            named = [f"`{code}` {entry['name']}" for code, entry in entries.items() if "name" in entry]
            more: dict[str, int] = {}
            for entry in entries.values():
                if "name" not in entry:
                    more[entry["level"]] = more.get(entry["level"], 0) + 1
            named += [f"and {count} more of the level {level}" for level, count in more.items()]
            if named:
                lines.append(f"| {action} | {'; '.join(named)} |")
        lines += (
            ["", "Sources:", ""]
            + [f"- `{key}`: {value}" for key, value in document["sources"].items()]
            + [""]
        )
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(tables(), end="")
