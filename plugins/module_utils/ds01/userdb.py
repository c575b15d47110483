"""A user made known inside an image: edits of /etc/passwd, /etc/group and /etc/shadow. Pure text.

Done by DS01 itself, so that it works in images that have neither useradd nor a shell, and in
images that already hold that uid, gid or name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .names import Account

_LOGIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_ROOT = "root:x:0:0:root:/root:/bin/sh"


def login_name(account: Account) -> str:
    """The user's name inside: its own, or `u<uid>` where a passwd file cannot carry it."""
    return account.name if _LOGIN.fullmatch(account.name) else f"u{account.uid}"


def home(account: Account) -> str:
    """The user's home inside the container."""
    return f"/home/{login_name(account)}"


def passwd(text: str | None, account: Account, shell: str) -> str:
    """/etc/passwd with exactly one entry for the uid and for the name: the user's."""
    name = login_name(account)
    lines = _lines(text) or [_ROOT]
    kept = [line for line in lines if _field(line, 0) != name and _field(line, 2) != str(account.uid)]
    return _text([*kept, f"{name}:x:{account.uid}:{account.gid}:{name}:{home(account)}:{shell}"])


def group(text: str | None, account: Account) -> str:
    """/etc/group in which the gid has a name. A group the image has for that gid stays as it is."""
    lines = _lines(text) or ["root:x:0:"]
    if any(_field(line, 2) == str(account.gid) for line in lines):
        return _text(lines)
    name = account.group if _LOGIN.fullmatch(account.group) else f"g{account.gid}"
    if any(_field(line, 0) == name for line in lines):
        name = f"{name}_{account.gid}"
    return _text([*lines, f"{name}:x:{account.gid}:"])


def shadow(text: str, account: Account) -> str:
    """/etc/shadow with a locked password for the user, which sudo's account check wants to find."""
    name = login_name(account)
    kept = [line for line in _lines(text) if _field(line, 0) != name]
    return _text([*kept, f"{name}:*:19000:0:99999:7:::"])


def _lines(text: str | None) -> list[str]:
    return [line for line in (text or "").splitlines() if line.strip()]


def _field(line: str, index: int) -> str:
    fields = line.split(":")
    return fields[index] if index < len(fields) else ""


def _text(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
