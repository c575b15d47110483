"""The user made known in images of every kind."""

from __future__ import annotations

import pytest
from ds01 import userdb
from ds01.names import Account
from hypothesis import given
from hypothesis import strategies as st

ALICE = Account("alice", 2001, 2001, "/home/alice", group="alice")
LINE = "alice:x:2001:2001:alice:/home/alice:/bin/bash"


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        pytest.param(None, ["root"], id="an image without the file"),
        pytest.param("", ["root"], id="an empty file"),
        pytest.param("root:x:0:0::/root:/bin/sh\n", ["root"], id="root alone"),
        pytest.param("root:x:0:0::/root:/bin/sh", ["root"], id="no newline at the end"),
        pytest.param("root:x:0:0::/:/bin/sh\nubuntu:x:2001:2001::/home/ubuntu:/bin/sh\n", ["root"], id="uid taken"),
        pytest.param("root:x:0:0::/:/bin/sh\nalice:x:7:7::/home/a:/bin/sh\n", ["root"], id="name taken"),
        pytest.param("root:x:0:0::/:/bin/sh\nnobody:x:65534:65534:::\n", ["root", "nobody"], id="others stay"),
        pytest.param("root:x:0:0::/:/bin/sh\nalice2:x:20011:1:::\n", ["root", "alice2"], id="look-alikes stay"),
    ],
)
def test_passwd_has_the_user_once(before: str | None, kept: list[str]) -> None:
    lines = userdb.passwd(before, ALICE, "/bin/bash").splitlines()
    assert [line.split(":")[0] for line in lines] == [*kept, "alice"]
    assert lines[-1] == LINE


@pytest.mark.parametrize(
    ("before", "last"),
    [
        pytest.param(None, "alice:x:2001:", id="an image without the file"),
        pytest.param("root:x:0:\n", "alice:x:2001:", id="gid free"),
        pytest.param("root:x:0:\nubuntu:x:2001:\n", "ubuntu:x:2001:", id="gid taken: the image's group stays"),
        pytest.param("root:x:0:\nalice:x:7:\n", "alice_2001:x:2001:", id="name taken by another gid"),
    ],
)
def test_the_gid_has_a_name(before: str | None, last: str) -> None:
    assert userdb.group(before, ALICE).splitlines()[-1] == last


def test_the_password_is_locked() -> None:
    assert userdb.shadow("root:*:1::::::\nalice:$6$secret:1::::::\n", ALICE) == (
        "root:*:1::::::\nalice:*:19000:0:99999:7:::\n"
    )


@pytest.mark.parametrize("name", ["two words", "müller", "a:b", "-x", "new\nline"])
def test_a_name_that_a_passwd_file_cannot_carry_becomes_the_uid(name: str) -> None:
    account = Account(name, 1_200_000_001, 7, "/home/x", group=name)
    assert userdb.login_name(account) == "u1200000001"
    assert userdb.home(account) == "/home/u1200000001"
    assert userdb.group("", account).splitlines()[-1] == "g7:x:7:"


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=200))
def test_any_file_ends_with_exactly_one_entry_for_name_and_uid(text: str) -> None:
    lines = userdb.passwd(text, ALICE, "/bin/sh").split("\n")
    fields = [line.split(":") for line in lines if line]
    assert sum(f[0] == "alice" for f in fields) == 1
    assert sum(len(f) > 2 and f[2] == "2001" for f in fields) == 1
    assert userdb.passwd("\n".join(lines), ALICE, "/bin/sh") == "\n".join(lines)
