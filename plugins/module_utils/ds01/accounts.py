"""The host's users, from its name service. An adapter."""

from __future__ import annotations

import contextlib
import grp
import pwd

from .names import Account


def lookup(name_or_uid: str) -> Account | None:
    """The account with this login name, else with this uid in digits; None when there is none."""
    entry = None
    with contextlib.suppress(KeyError, ValueError, UnicodeError):
        entry = pwd.getpwnam(name_or_uid)
    if entry is None and name_or_uid.isdecimal() and name_or_uid.isascii():
        with contextlib.suppress(KeyError, OverflowError):
            entry = pwd.getpwuid(int(name_or_uid))
    if entry is None:
        return None
    group = str(entry.pw_gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(entry.pw_gid).gr_name
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_shell or "/bin/sh", group)


def is_login_name(name: str) -> bool:
    """Whether this host has that login name. A uid in digits is none: limits know users by name."""
    account = lookup(name)
    return account is not None and account.name == name
