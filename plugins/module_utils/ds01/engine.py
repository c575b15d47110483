"""The Docker engine, through the Docker SDK. An adapter: no decisions, every call bounded in time."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from . import names, occupancy, units
from .container_spec import WORKSPACE
from .errors import Ds01Error
from .libraries import require

RUNNING = ("running", "restarting", "paused")
"""Statuses in which a container has its devices open, or may have them open again without a start."""
STOPPED = ("exited", "dead")
MANAGED = "ds01.managed"
_TIMEOUT = 60
_LISTED_WITHIN, _PAUSE = 2.0, 0.02
"""Seconds."""
_NEVER = "0001-01-01"


@dataclass(frozen=True)
class Container:
    """One container as the engine shows it. `status`: created, running, paused, restarting,
    removing, exited or dead; `finished_at` is None until it first stopped; `command` is its entry
    point and command, where it was inspected alone; `workspace` the host's directory at /workspace;
    `image_id` the image that it was made from, whatever `image` names by now."""

    id: str
    name: str
    status: str
    image: str
    labels: Mapping[str, str]
    finished_at: datetime | None = None
    command: tuple[str, ...] = ()
    workspace: str = ""
    image_id: str = ""

    @property
    def user(self) -> str:
        return self.labels.get("ds01.user", "")

    @property
    def own(self) -> bool:
        """Whether DS01 made it: an image that was committed from one of its containers carries the labels on."""
        named = self.name.startswith(f"{self.labels.get('ds01.project')}._.")
        return named and self.labels.get("ds01.allocation") == (self.name if self.gpus else "")

    @property
    def called(self) -> str:
        """What its user calls it: also while it is set aside for a new one."""
        before = names.before_aside(self.name)
        aside = before != self.name and replace(self, name=before).own
        return before if aside else self.name

    @property
    def gpus(self) -> int:
        """How many devices it asks for."""
        value = self.labels.get("ds01.gpus", "0")
        return int(value) if value.isdecimal() else 0


@dataclass(frozen=True)
class Listing:
    """Every container of the engine in every state: DS01's, by their label, and everybody else's."""

    ours: tuple[Container, ...]
    others: tuple[Container, ...]


@dataclass(frozen=True)
class Image:
    id: str
    labels: Mapping[str, str]


class Engine:
    """A connected engine."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def containers(self) -> tuple[Container, ...]:
        """DS01's containers in every state, in one call."""
        with _errors("list containers"):
            found = self._client.containers(all=True, filters={"label": f"{MANAGED}=true"})
        return tuple(_listed(c) for c in found if c.get("Names"))

    def listing(self) -> Listing:
        """DS01's containers, as `containers` gives them, and all others, in one call."""
        with _errors("list containers"):
            found = self._client.containers(all=True)
        return Listing(
            ours=tuple(_listed(c) for c in found if _managed(c) and c.get("Names")),
            others=tuple(_listed(c) for c in found if not _managed(c)),
        )

    def gpu_use(self, container_id: str) -> occupancy.GpuUse | None:
        """The GPUs that a container which is not DS01's was promised; None: none, or it is gone."""
        try:
            with _errors(f"inspect {container_id}"):
                return occupancy.gpu_use(self._client.inspect_container(container_id))
        except _NotFoundError:
            return None

    def container(self, name: str) -> Container | None:
        """One container by its exact name, with its last stop time."""

        try:
            with _errors(f"inspect {name}"):
                raw = self._client.inspect_container(name)
        except _NotFoundError:
            return None
        if raw["Name"].lstrip("/") != name:
            return None  # the engine also matches id prefixes
        finished = raw["State"].get("FinishedAt") or _NEVER
        return Container(
            id=raw["Id"],
            name=name,
            status=raw["State"]["Status"],
            image=raw["Config"]["Image"],
            labels=raw["Config"].get("Labels") or {},
            command=(*(raw["Config"].get("Entrypoint") or ()), *(raw["Config"].get("Cmd") or ())),
            finished_at=None if finished.startswith(_NEVER) else units.parse_time(finished),
            image_id=raw.get("Image") or "",
        )

    def made_from(self, name: str) -> Mapping[str, Any]:
        """What a container was made from, in the form of the create call; empty where it is gone."""
        try:
            with _errors(f"inspect {name}"):
                raw = self._client.inspect_container(name)
        except _NotFoundError:
            return {}
        return {**raw["Config"], "HostConfig": raw["HostConfig"]}

    def image(self, name: str) -> Image | None:
        """A local image, or None: DS01 never pulls."""
        try:
            with _errors(f"inspect image {name}"):
                raw = self._client.inspect_image(name)
        except _NotFoundError:
            return None
        return Image(raw["Id"], (raw.get("Config") or {}).get("Labels") or {})

    def identity(self) -> str:
        """Names this engine, as long as its data directory lives. Not asked without need: it takes its time."""
        with _errors("read its identity"):
            return str(self._client.info().get("ID") or "")

    def version(self) -> Mapping[str, Any]:
        with _errors("read its version"):
            return self._client.version()

    def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Create from an API body; the new id."""
        with _errors(f"create {name}"):
            return self._client.create_container_from_config(dict(body), name)["Id"]

    def start(self, name: str) -> None:
        with _errors(f"start {name}"):
            self._client.start(name)

    def rename(self, name: str, new: str) -> None:
        with _errors(f"rename {name}"):
            self._client.rename(name, new)

    def copy(self, source: str, target: str, path: str) -> bool:
        """Copy a file or directory from one container to another, over what is there; False where there is none.

        Raises Ds01Error `invalid_input` where the target does not have the directory that it is in.
        """
        try:
            with _errors(f"read {path} of {source}"):
                stream, _ = self._client.get_archive(source, path)
        except _NotFoundError:
            return False
        parent = posixpath.dirname(path)
        try:
            with _errors(f"write {path} into {target}"):
                self._client.put_archive(target, parent, stream)
        except _NotFoundError:
            raise Ds01Error("invalid_input", f"The new image has no directory {parent} for {path}.") from None
        return True

    def restart(self, name: str, timeout: int) -> None:
        """Stop and start; the engine resolves the container's CDI device anew."""
        with _errors(f"restart {name}"):
            self._client.restart(name, timeout=timeout)

    def stop(self, name: str, timeout: int) -> None:
        """Stop it, and see that the engine lists it as stopped: it answers a moment before it does."""
        with _errors(f"stop {name}"):
            self._client.stop(name, timeout=timeout)
        self.wait_until_listed(name)

    def wait_until_listed(self, name: str) -> None:
        """Wait a moment for the engine to list one of DS01's, which has stopped, as stopped."""
        deadline = time.monotonic() + _LISTED_WITHIN
        while self._is_listed_running(name) and time.monotonic() < deadline:
            time.sleep(_PAUSE)

    def _is_listed_running(self, name: str) -> bool:
        with _errors("list containers"):
            found = self._client.containers(all=True, filters={"label": f"{MANAGED}=true"})
        return any(f"/{name}" in (c.get("Names") or ()) and c["State"] in RUNNING for c in found)

    def end(self, name: str, timeout: int) -> None:
        """Stop it, and kill it where that does not work. One that is gone already is success."""
        with contextlib.suppress(_NotFoundError):
            try:
                with _errors(f"stop {name}"):
                    self._client.stop(name, timeout=timeout)
            except Ds01Error:
                with _errors(f"kill {name}"):
                    self._client.kill(name)

    def ends_within(self, name: str, seconds: float) -> bool:
        """Whether the container stops in this time."""
        import requests.exceptions

        with _errors(f"wait for {name}"):
            try:
                self._client.wait(name, timeout=seconds, condition="not-running")
            except (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError):
                return False
        return True

    def unpause(self, name: str) -> None:
        with _errors(f"unpause {name}"):
            self._client.unpause(name)

    def last_words(self, name: str) -> str:
        """The end of the container's output, for an error message."""
        with _errors(f"read the output of {name}"):
            return self._client.logs(name, tail=5).decode(errors="replace").strip()

    def remove(self, name: str) -> None:
        """Remove, running or not. One that is gone already is success."""
        with contextlib.suppress(_NotFoundError), _errors(f"remove {name}"):
            self._client.remove_container(name, force=True)

    def discard(self, container_id: str) -> None:
        """Remove one that does not run; of one that does the engine refuses it (Ds01Error `engine_error`)."""
        with contextlib.suppress(_NotFoundError), _errors(f"remove {container_id}"):
            self._client.remove_container(container_id)

    def read_file(self, name: str, path: str) -> bytes | None:
        """A file inside a container, running or not; None when there is none."""
        for _ in range(2):
            try:
                with _errors(f"read {path} of {name}"):
                    stream, stat = self._client.get_archive(name, path)
                    data = b"".join(stream)
            except _NotFoundError:
                return None
            if not stat.get("linkTarget"):
                return _single_member(data)
            path = stat["linkTarget"]
        return None

    def exists(self, name: str, path: str) -> bool:
        """Whether a path exists inside a container."""
        try:
            with _errors(f"look for {path} in {name}"):
                stream, _ = self._client.get_archive(name, path)
                stream.close()
        except _NotFoundError:
            return False
        return True

    def unpack(self, name: str, archive: bytes) -> None:
        """Unpack a tar archive at the container's root."""
        with _errors(f"write files into {name}"):
            self._client.put_archive(name, "/", archive)


class Snapshot:
    """What an engine had at one moment, from one listing, and its images, each asked for once: for many questions."""

    def __init__(self, engine: Engine) -> None:
        listing = engine.listing()
        self._containers = {c.name: c for c in (*listing.ours, *listing.others)}
        self._images: dict[str, Image | None] = {}
        self._engine = engine

    def container(self, name: str) -> Container | None:
        """One container, without what a listing does not tell: when it stopped, and its command."""
        return self._containers.get(name)

    def image(self, name: str) -> Image | None:
        if name not in self._images:
            self._images[name] = self._engine.image(name)
        return self._images[name]


def _managed(raw: Mapping[str, Any]) -> bool:
    return (raw.get("Labels") or {}).get(MANAGED) == "true"


def _listed(raw: Mapping[str, Any]) -> Container:
    """One entry of a list. A container loses its name a moment before it is gone: its id stands for it."""
    name = raw["Names"][0].lstrip("/") if raw.get("Names") else raw["Id"][:12]
    workspace = next((m["Source"] for m in raw.get("Mounts") or () if m.get("Destination") == WORKSPACE), "")
    labels = raw.get("Labels") or {}
    # Once the name stands for another image, the engine lists the old one's id in its place.
    image = (labels.get("ds01.image") if _managed(raw) else "") or raw["Image"]
    return Container(
        raw["Id"], name, raw["State"], image, labels, workspace=workspace, image_id=raw.get("ImageID") or ""
    )


def _single_member(data: bytes) -> bytes | None:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                return file.read() if file else None
    return None


def disabled() -> bool:
    """Whether this run was told that there is no engine (tests, planning)."""
    return os.environ.get("DS01_ENGINE") == "none"


def connect() -> Engine:
    """The engine that DOCKER_HOST names, else the local one.

    Raises Ds01Error `engine_unavailable`, `permission_denied` where this user may not use its socket, or
    `library_missing` without the Docker SDK.
    """
    docker = require("docker", "docker")
    with _errors("connect"):
        return Engine(docker.APIClient(**docker.utils.kwargs_from_env(), version="auto", timeout=_TIMEOUT))


class _NotFoundError(Exception):
    """The engine has no such container, image or path."""


@contextlib.contextmanager
def _errors(action: str) -> Iterator[None]:
    """Turn the SDK's errors into ours, with the engine's own words."""
    import docker.errors
    import requests.exceptions

    try:
        yield
    except docker.errors.NotFound as exc:
        if "unresolvable CDI" in str(exc.explanation):
            raise _no_device(action, exc) from None
        raise _NotFoundError(str(exc.explanation)) from None
    except docker.errors.APIError as exc:
        if "unresolvable CDI" in str(exc.explanation):
            raise _no_device(action, exc) from None
        raise Ds01Error("engine_error", f"The Docker engine could not {action}: {exc.explanation}") from None
    except (docker.errors.DockerException, requests.exceptions.RequestException) as exc:
        raise _unreachable(action, exc) from None


def _unreachable(action: str, exc: BaseException) -> Ds01Error:
    where, cause = os.environ.get("DOCKER_HOST", "its default socket"), _cause(exc)
    words = cause.strerror if cause else type(exc).__name__
    if isinstance(cause, PermissionError):
        message = f"The Docker engine may not be used on {where} (could not {action}: {words})."
        return Ds01Error("permission_denied", message, "Run as root.")
    message = f"The Docker engine does not answer on {where} (could not {action}: {words})."
    return Ds01Error("engine_unavailable", message, "Check it with: systemctl status docker")


def _cause(exc: BaseException) -> OSError | None:
    """The operating system's own error, from under the layers of HTTP libraries."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen
        seen = next((arg for arg in seen.args if isinstance(arg, BaseException)), None) or seen.__context__
    return None


def _no_device(action: str, exc: Any) -> Ds01Error:
    return Ds01Error(
        "not_allocated",
        f"The Docker engine could not {action}: the container has no device now ({exc.explanation}).",
        "Start it with playbooks/container_start.yml, which allocates one.",
    )
