"""Names that people give, and what Docker, CDI and systemd make of them."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from ds01 import names
from ds01.errors import Ds01Error
from ds01.names import Account
from hypothesis import given
from hypothesis import strategies as st

ACCOUNTS = [
    Account("alice", 1001, 1001, "/home/alice"),
    Account("mary-ann", 1002, 1002, "/home/mary-ann"),
    Account("h.baker@uni.example", 1201234567, 1201234567, "/home/h.baker"),
    Account("jürgen", 1004, 1004, "/home/jürgen"),
    Account("Anna Maria", 1005, 1005, "/home/anna"),
    Account("bob_", 1006, 1006, "/home/bob_"),
    Account("a" * 64, 1007, 1007, "/home/a"),
    Account(r"UNI\carol", 1008, 1008, "/home/carol"),
    Account(".dot", 1009, 1009, "/home/dot"),
]


def lookup(name_or_uid: str) -> Account | None:
    return next((a for a in ACCOUNTS if name_or_uid in (a.name, str(a.uid))), None)


HOSTILE = {
    "empty": "",
    "slash": "a/b",
    "absolute": "/etc/passwd",
    "parent": "..",
    "parent inside": "a..b",
    "up and away": "../../etc",
    "leading dash": "-rf",
    "leading space": " a",
    "trailing space": "a ",
    "newline": "a\nb",
    "trailing newline": "a\n",
    "tab": "a\tb",
    "NUL": "a\0b",
    "escape sequence": "a\x1b[31m",
    "bell": "a\ab",
    "zero width": "a\u200bb",
    "right to left": "a\u202eb",
    "not decodable": "a\udcff",
}
HOSTILE_PROJECTS = HOSTILE | {
    "space": "a b",
    "template": "{{ lookup('pipe', 'id') }}",
    "shell": "$(id)",
    "semicolon": "a;id",
    "quote": 'a"b',
    "glob": "a*",
    "at": "a@b",
    "colon": "a:b",
    "comma": "a,b",
    "equals": "a=b",
    "backslash": r"a\b",
    "percent": "%n",
    "non-ASCII": "prüfung",
    "300 characters": "a" * 300,
    "64 characters": "a" * 64,
    "leading dot": ".a",
    "leading underscore": "_a",
    "trailing dot": "a.",
    "separator inside": "a._.b",
    "half a separator": "a._b",
    "separator alone": "._.",
}


@pytest.mark.parametrize("project", ["a", "my-project", "thesis_2025", "v1.2", "A", "0", "x" * 63, "a-", "a_"])
def test_project_name(project: str) -> None:
    assert names.check_project(project) == project


@pytest.mark.parametrize("project", HOSTILE_PROJECTS.values(), ids=HOSTILE_PROJECTS.keys())
def test_hostile_project_name_is_refused_with_the_rule(project: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        names.check_project(project)
    assert caught.value.reason == "invalid_input"
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("user", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_user_name_is_refused(user: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        names.canonical_user(user, lambda _: None)
    assert caught.value.reason == "invalid_input"


def test_user_name_longer_than_any_name_service_allows_is_refused() -> None:
    with pytest.raises(Ds01Error, match="has 257"):
        names.check_user("a" * 257)


@pytest.mark.parametrize("user", ["h.baker@nowhere", "Otto Normal", "çelik", "{{ 7*7 }}", "$(id)", "bob-", ".hidden"])
def test_unknown_user_that_only_a_uid_can_stand_for_is_refused(user: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        names.canonical_user(user, lambda _: None)
    assert caught.value.reason == "unknown_user"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given_", "canonical"),
    [
        ("alice", "alice"),
        ("1001", "alice"),
        ("1201234567", "h.baker@uni.example"),
        ("h.baker@uni.example", "h.baker@uni.example"),
        ("nobody-here", "nobody-here"),
    ],
)
def test_a_uid_means_its_user_and_a_plain_unknown_name_itself(given_: str, canonical: str) -> None:
    assert names.canonical_user(given_, lookup) == canonical


@pytest.mark.parametrize(
    ("project", "user", "full"),
    [
        ("my-project", "alice", "my-project._.alice"),
        ("my-project", "1001", "my-project._.alice"),
        ("my-project._.alice", "alice", "my-project._.alice"),
        ("my-project._.1001", "alice", "my-project._.alice"),
        ("my-project._.alice", "1001", "my-project._.alice"),
        ("p", "mary-ann", "p._.mary-ann"),
        ("p", "h.baker@uni.example", "p._.1201234567"),
        ("p._.1201234567", "h.baker@uni.example", "p._.1201234567"),
        ("p._.h.baker@uni.example", "1201234567", "p._.1201234567"),
        ("p", "jürgen", "p._.1004"),
        ("p", "Anna Maria", "p._.1005"),
        ("p", "bob_", "p._.1006"),
        ("p", "a" * 64, "p._.1007"),
        ("p", r"UNI\carol", "p._.1008"),
        ("p", ".dot", "p._.1009"),
        ("p_", "alice", "p_._.alice"),
    ],
)
def test_container_name(project: str, user: str, full: str) -> None:
    name = names.container_name(project, user, lookup)
    assert name.full == full
    assert name.user == names.canonical_user(user, lookup)
    assert names.split(full)[0] == name.project


@pytest.mark.parametrize("container", ["p._.mary-ann", "p._.1002", "p._.unknown"])
def test_a_full_name_of_somebody_else_is_refused(container: str) -> None:
    with pytest.raises(Ds01Error, match="does not belong to alice") as caught:
        names.container_name(container, "alice", lookup)
    assert caught.value.reason == "invalid_input"


@pytest.mark.parametrize(
    "container",
    [
        "._.alice",
        "p._.",
        "a/b._.alice",
        "..._.alice",
        "-p._.alice",
        "p._.alice._.alice",
        "p._.alice\n",
        "a._.b._.alice",
    ],
)
def test_a_full_name_is_checked_in_both_parts(container: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        names.container_name(container, "alice", lookup)
    assert caught.value.reason == "invalid_input"


def test_a_login_name_in_digits_and_the_user_with_that_uid_do_not_share_a_container() -> None:
    accounts = [Account("1001", 5000, 5000, "/home/1001"), Account("h.baker@uni", 1001, 1001, "/home/h.baker")]

    def find(name: str) -> Account | None:
        by_name = next((a for a in accounts if a.name == name), None)
        return by_name or next((a for a in accounts if str(a.uid) == name), None)

    full = {names.container_name("p", account.name, find).full for account in accounts}
    assert len(full) == 2


_DOCKER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_CDI_DEVICE_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.:-]*[a-zA-Z0-9])?")


@given(st.text(max_size=70), st.text(max_size=70))
def test_whatever_is_accepted_suits_docker_cdi_and_a_file_name(project: str, user: str) -> None:
    try:
        name = names.container_name(project, user, lambda _: Account(user, 4711, 4711, "/home/x"))
    except Ds01Error:
        return
    assert _DOCKER_NAME.fullmatch(name.full)
    assert _CDI_DEVICE_NAME.fullmatch(name.full)
    assert "/" not in name.full
    assert len(f"ds01-{name.full}.json") < 255


_PLAIN = "abAB01_.-"


@given(st.text(_PLAIN, min_size=1, max_size=8), st.text(_PLAIN, min_size=1, max_size=8))
def test_a_container_name_splits_into_what_it_was_made_of(project: str, user: str) -> None:
    try:
        name = names.container_name(project, user, lambda _: None)
    except Ds01Error:
        return
    assert names.split(name.full) == (project, user)


# What systemd-escape(1) of systemd 257 prints.
ESCAPED = {
    "alice": "alice",
    "mary-ann": r"mary\x2dann",
    "-x": r"\x2dx",
    ".x": r"\x2ex",
    "a.b": "a.b",
    "h.baker@uni": r"h.baker\x40uni",
    "jürgen": r"j\xc3\xbcrgen",
    "a b": r"a\x20b",
    r"a\b": r"a\x5cb",
    "x:y": "x:y",
    "_u": "_u",
    "a+b": r"a\x2bb",
    "1001": "1001",
    "{{x}}": r"\x7b\x7bx\x7d\x7d",
}


@pytest.mark.parametrize(("part", "escaped"), ESCAPED.items(), ids=ESCAPED.keys())
def test_slice_parts_are_escaped_as_systemd_does(part: str, escaped: str) -> None:
    assert names.escape_slice_part(part) == escaped


_SYSTEMD_ESCAPE = shutil.which("systemd-escape")


@pytest.mark.skipif(_SYSTEMD_ESCAPE is None, reason="systemd-escape is not installed")
def test_the_table_is_what_systemd_escape_says() -> None:
    command = [_SYSTEMD_ESCAPE, "--", *ESCAPED]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    assert said.split() == list(ESCAPED.values())


def test_a_slash_does_not_become_a_level_of_the_hierarchy() -> None:
    assert names.escape_slice_part("a/b") == r"a\x2fb"


_PART = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(_PART, _PART)
def test_two_users_never_share_an_escaped_name(one: str, other: str) -> None:
    assert (names.escape_slice_part(one) == names.escape_slice_part(other)) == (one == other)


@given(st.tuples(_PART, _PART), st.tuples(_PART, _PART))
def test_two_users_never_share_a_slice(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (names.user_slice(*one) == names.user_slice(*other)) == (one == other)


@given(_PART, _PART)
def test_a_slice_s_owner_can_be_told_from_its_name(group: str, user: str) -> None:
    assert names.slice_owner(names.user_slice(group, user)) == (group, user)
    assert names.slice_owner(f"ds01-{names.escape_slice_part(group)}.slice") == (group, "")


@pytest.mark.parametrize(
    "unit",
    [
        "ds01.slice",
        "system.slice",
        "ds02-lab-alice.slice",
        "ds01-lab-mary-ann.slice",
        "ds01-lab-.slice",
        "ds01--alice.slice",
        "ds01-lab-alice.scope",
        r"ds01-lab-\xff.slice",
        r"ds01-lab-\x61lice.slice",
        "ds01-lab-jürgen.slice",
    ],
)
def test_what_is_no_slice_of_a_user_has_no_owner(unit: str) -> None:
    assert names.slice_owner(unit) is None


@given(_PART, _PART)
def test_a_user_slice_lies_directly_below_its_group(group: str, user: str) -> None:
    parts = names.user_slice(group, user).removesuffix(".slice").split("-")
    assert len(parts) == 3
    assert parts[1] == names.escape_slice_part(group)
    assert names.user_slice(group, user).startswith(names.group_dropin_dir(group).removesuffix(".slice.d"))


def test_slice_names_as_documented() -> None:
    assert names.user_slice("researchers", "alice") == "ds01-researchers-alice.slice"
    assert names.user_slice("researchers", "mary-ann") == r"ds01-researchers-mary\x2dann.slice"
    assert names.group_dropin_dir("researchers") == "ds01-researchers-.slice.d"
    assert names.cdi_device("my-project._.alice") == "ds01.io/gpu=my-project._.alice"
