"""Which steps lead from what the engine shows to what is wished."""

from __future__ import annotations

import pytest
from ds01.container_spec import ContainerRequest
from ds01.container_steps import Wish, steps
from ds01.errors import Ds01Error
from ds01.names import ContainerName

NAME = ContainerName("p", "alice", "p._.alice")
MAKE = ("allocate", "create", "start")
STATUSES = ("created", "running", "paused", "restarting", "exited", "dead")


def wish(state: str, image: bool = True, recreate: str = "never") -> Wish:
    return Wish(state, NAME, ContainerRequest(NAME, "img") if image else None, recreate=recreate)


@pytest.mark.parametrize(
    ("state", "status", "expected"),
    [
        ("present", None, ("create",)),
        ("present", "exited", ()),
        ("started", None, MAKE),
        ("started", "created", ("allocate", "start")),
        ("started", "exited", ("allocate", "start")),
        ("started", "dead", ("allocate", "start")),
        ("started", "running", ()),
        ("started", "restarting", ()),
        ("started", "paused", ("unpause",)),
        ("stopped", "running", ("stop",)),
        ("stopped", "paused", ("stop",)),
        ("stopped", "exited", ()),
        ("stopped", "created", ()),
        ("restarted", None, MAKE),
        ("restarted", "running", ("allocate", "restart")),
        ("restarted", "exited", ("allocate", "start")),
        ("absent", None, ("release",)),
        *[("absent", status, ("remove", "release")) for status in (*STATUSES, "removing")],
    ],
)
def test_steps(state: str, status: str | None, expected: tuple[str, ...]) -> None:
    assert steps(wish(state), status, differs=False) == expected


@pytest.mark.parametrize("state", ["present", "started", "stopped", "restarted"])
def test_without_an_image_the_container_has_to_exist(state: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        steps(wish(state, image=False), None, differs=False)
    assert caught.value.reason == "container_missing"


@pytest.mark.parametrize("state", ["present", "started", "stopped", "restarted"])
def test_a_container_that_is_being_removed_is_left_alone(state: str) -> None:
    with pytest.raises(Ds01Error) as caught:
        steps(wish(state), "removing", differs=False)
    assert caught.value.reason == "container_busy"


@pytest.mark.parametrize(
    ("recreate", "differs", "anew"),
    [
        ("never", True, False),
        ("never", False, False),
        ("on_change", True, True),
        ("on_change", False, False),
        ("always", False, True),
    ],
)
def test_only_who_asks_for_it_loses_a_container(recreate: str, differs: bool, anew: bool) -> None:
    found = steps(wish("started", recreate=recreate), "running", differs)
    assert found == (("allocate", "set_aside", "create", "start") if anew else ())


@pytest.mark.parametrize("state", ["present", "started", "restarted"])
def test_what_a_request_left_that_died_is_made_anew(state: str) -> None:
    """Nothing ran in it yet, and its user was not made known inside."""
    found = steps(wish(state), "created", differs=False, finished=False)
    assert found == (("remove", "create") if state == "present" else ("allocate", "remove", "create", "start"))
    with pytest.raises(Ds01Error) as caught:
        steps(wish(state, image=False), "created", differs=False, finished=False)
    assert caught.value.reason == "container_missing"


@pytest.mark.parametrize("status", STATUSES)
def test_what_was_done_is_not_done_again(status: str) -> None:
    """After a start the engine shows running, after a stop exited: nothing is left to do."""
    assert steps(wish("started"), "running", differs=False) == ()
    assert steps(wish("stopped"), "exited", differs=False) == ()
    assert "create" not in steps(wish("present"), status, differs=True)
