"""Names: what users may call things, and what systemd, Docker and CDI can carry. Pure.

A container is `<project>._.<user>`. A user name that Docker or CDI cannot carry appears there as
the user's uid; the slice keeps the real name, escaped, because systemd can carry anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .errors import Ds01Error, invalid_input

SEPARATOR = "._."
MAX_NAME = 63
MAX_USER = 256
_MAX_SLICE_PART = 160
"""Characters of a unit's name (255 in all) that the escaped user may take."""

# Docker's container name and CDI's device name allow these; a CDI device name must end in a letter
# or digit, so a user name that does not is written as a uid.
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DOCKER_USER = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_SLICE_SAFE = re.compile(r"[A-Za-z0-9:_.]")


@dataclass(frozen=True)
class Account:
    """A user of the host, as the name service knows it."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str = "/bin/bash"
    group: str = ""


AccountLookup = Callable[[str], "Account | None"]
"""Finds an account by name or by uid in digits; None when the host does not know it."""


@dataclass(frozen=True)
class ContainerName:
    """A container's name and the two parts that users speak of."""

    project: str
    user: str
    full: str


def check_project(project: str) -> str:
    """The project name itself, or Ds01Error `invalid_input` with the rule it breaks."""
    rule = "Use letters, digits, '_', '.' and '-', starting with a letter or digit, such as my-project."
    if len(project) > MAX_NAME:
        raise invalid_input(
            f"The project name is {len(project)} characters long; {MAX_NAME} are allowed.",
            "Choose a shorter name.",
        )
    if not _PROJECT.fullmatch(project) or ".." in project or "._" in project or project.endswith("."):
        raise invalid_input(f"{project!r} cannot be a project name.", rule)
    return project


def check_user(user: str) -> str:
    """The user name itself, or Ds01Error `invalid_input`. Anything a name service may hold passes."""
    if not user or len(user) > MAX_USER:
        raise invalid_input(
            f"A user name has 1 to {MAX_USER} characters; this one has {len(user)}.", "Give the login name."
        )
    if "/" in user or ".." in user or user.startswith("-") or user != user.strip() or not user.isprintable():
        raise invalid_input(f"{user!r} cannot be a user name.", "Give the login name, such as alice.")
    if len(escape_slice_part(user)) > _MAX_SLICE_PART:
        raise invalid_input(f"The user name {user!r} is too long for a systemd slice.")
    return user


def canonical_user(user: str, lookup: AccountLookup) -> str:
    """The login name for a name or a uid in digits.

    A plain name is taken as it is (limits and allocation work for accounts this machine does not
    know); one that only its uid can stand for has to exist.
    """
    check_user(user)
    account = lookup(user)
    if account:
        return account.name
    if not _carried(user):
        raise Ds01Error(
            "unknown_user",
            f"There is no user {user!r} on this host.",
            "Check the spelling with: getent passwd",
        )
    return user


def container_name(project: str, user: str, lookup: AccountLookup) -> ContainerName:
    """The container's name for a project (or a full name) and a user.

    Raises Ds01Error `invalid_input` for a bad part or a full name that belongs to somebody else.
    """
    user = canonical_user(user, lookup)
    if SEPARATOR in project:
        project, owner = split(project)
        if SEPARATOR in owner:
            raise invalid_input(
                f"{project}{SEPARATOR}{owner} cannot be a container's name.", "Write my-project._.alice."
            )
        if canonical_user(owner, lookup) != user:
            raise invalid_input(f"Container {project}{SEPARATOR}{owner} does not belong to {user}.")
    check_project(project)
    return ContainerName(project, user, f"{project}{SEPARATOR}{_name_tag(user, lookup)}")


def _carried(user: str) -> bool:
    """Whether the name itself can stand in a container's name, unmistakably.

    One of digits would be taken for somebody's uid, one with `._` for a part of the separator.
    """
    plain = len(user) <= MAX_NAME and _DOCKER_USER.fullmatch(user) and not user.isdecimal()
    return bool(plain) and "._" not in user and not user.startswith("_.")


def _name_tag(user: str, lookup: AccountLookup) -> str:
    if _carried(user):
        return user
    account = lookup(user)
    if account is None:
        raise Ds01Error("unknown_user", f"There is no user {user!r} on this host.")
    return str(account.uid)


def split(full_name: str) -> tuple[str, str]:
    """(`my-project`, `alice`) of `my-project._.alice`."""
    project, _, user = full_name.partition(SEPARATOR)
    return project, user


def as_called(full_name: str, user: str) -> ContainerName:
    """The name of a container that is there: whose account is gone is not looked up anew."""
    return ContainerName(split(full_name)[0], user, full_name)


def escape_slice_part(part: str) -> str:
    """As `systemd-escape` does: `mary-ann` is `mary\\x2dann`, for `-` in a slice name means hierarchy."""
    escaped = []
    for i, char in enumerate(part):
        if _SLICE_SAFE.fullmatch(char) and not (i == 0 and char == "."):
            escaped.append(char)
        else:
            escaped.extend(f"\\x{byte:02x}" for byte in char.encode())
    return "".join(escaped)


def user_slice(group: str, user: str) -> str:
    """The user's slice, below the group's: `ds01-researchers-alice.slice`."""
    return f"ds01-{escape_slice_part(group)}-{escape_slice_part(user)}.slice"


def slice_owner(unit: str) -> tuple[str, str] | None:
    """(group, user) of a user's slice, (group, "") of a group's; None for any other unit. What `user_slice` made."""
    top, *parts = unit.removesuffix(".slice").split("-")
    if top != "ds01" or not unit.endswith(".slice") or not 1 <= len(parts) <= 2 or not all(parts):
        return None
    try:
        group, user = (_unescaped(part) for part in (*parts, "")[:2])
    except UnicodeDecodeError:
        return None
    return (group, user) if [escape_slice_part(part) for part in (group, user) if part] == parts else None


def _unescaped(part: str) -> str:
    """The inverse of `escape_slice_part`. Raises UnicodeDecodeError for bytes that are no text."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), part.encode())
    return raw.decode()


def group_dropin_dir(group: str) -> str:
    """The drop-in directory that systemd applies to every user slice of a group."""
    return f"ds01-{escape_slice_part(group)}-.slice.d"


_ASIDE = "replaced."


def set_aside(container: str) -> str:
    """What a container is called while another one takes its place."""
    return f"{_ASIDE}{container}"


def before_aside(container: str) -> str:
    """What it was called before, if it was set aside: a user may have a project of such a name."""
    return container.removeprefix(_ASIDE)


def cdi_device(container: str) -> str:
    """The CDI device that a container asks for."""
    return f"ds01.io/gpu={container}"
