"""A server with one container that is looked at each minute: what the tests of the policies share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from ds01.drift import Action
from ds01.limits import Config
from ds01.policies import Clock, Decision, DeviceUse, Rules, Sample, State, Usage, Watched, decide, rules_of
from support import NOW, config_of

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
MIB = 1024**2
CONTAINER = Watched("c0ffee" * 10 + "c0de", "p._.alice", "alice", 1)
NOTHING = Sample()
"""A look that shows nothing at all: cgroup and driver both unreadable."""


@dataclass
class World:
    """The container, its counters and the host's clocks. `told` is what was decided, with the minutes since the
    beginning; the container stops when that is decided, and that is told, unless `deaf`."""

    config: Config
    container: Watched = CONTAINER
    device: DeviceUse = field(default_factory=lambda: DeviceUse((4711,), 500 * MIB, 0))
    demand: bool = False
    deaf: bool = False
    keep_alive: datetime | None = None
    state: State = field(default_factory=State)
    elapsed: timedelta = timedelta(0)
    uptime: timedelta = 100 * HOUR
    boot: str = "first boot"
    time: datetime = NOW
    started: timedelta = 100 * HOUR
    cpu: timedelta = timedelta(0)
    network: int | None = 0
    running: bool = True
    told: list[tuple[float, Action]] = field(default_factory=list)
    last: Decision = field(default_factory=lambda: Decision(State()))

    @property
    def clock(self) -> Clock:
        return Clock(self.time, self.uptime, self.boot)

    @property
    def rules(self) -> Rules:
        return rules_of(self.config, self.container, self.time, demand=self.demand)

    def sample(self) -> Sample:
        devices = (self.device,) * self.container.gpus
        return Sample(Usage(self.started, self.cpu, 0, self.network), devices, self.keep_alive)

    def wait(self, span: timedelta) -> World:
        """Time passes, unseen."""
        self.elapsed, self.uptime, self.time = self.elapsed + span, self.uptime + span, self.time + span
        return self

    def look(self, sample: Sample | None = None) -> Decision:
        watched = replace(self.container, running=self.running)
        self.last = decide(watched, sample or self.sample(), self.state, self.rules, self.clock)
        self.state = self.last.state
        self.told += [(self.elapsed / MINUTE, action) for action in self.last.actions]
        if self.last.stop:
            self.told.append((self.elapsed / MINUTE, self.last.stop))
            if not self.deaf:
                self.stop()
                self.state = self.state.stopped
        return self.last

    def minutes(self, count: int, each: Callable[[World], Any] | None = None, sample: Sample | None = None) -> World:
        """So many minutes with a look at the end of each; `each` happens before a look."""
        for _ in range(count):
            self.wait(MINUTE)
            if each:
                each(self)
            self.look(sample)
        return self

    def stop(self) -> None:
        self.running = False

    def start(self) -> World:
        """The container starts (again), now."""
        self.running, self.started, self.cpu, self.network = True, self.uptime, timedelta(0), 0
        return self

    def reboot(self) -> World:
        self.boot, self.uptime, self.running = f"{self.boot}, and another", timedelta(minutes=2), False
        return self

    def kinds(self, policy: str | None = None) -> list[tuple[float, str]]:
        """(minute, what): warned, last warned, stopped, exempted."""
        return [(minute, _name(a)) for minute, a in self.told if policy in (None, a.details["policy"])]

    def stopped_at(self) -> float | None:
        return next((minute for minute, what in self.kinds() if what == "stopped"), None)


def _name(action: Action) -> str:
    name = action.kind.removeprefix("policy.")
    return f"last {name}" if action.details.get("stage") == "last" else name


def world(container: Watched = CONTAINER, **document: Any) -> World:
    """A world in which neither policy holds, but for what the file says, and whose grace is over at once."""
    policies = {"grace_period": 0, "idle_detection_window": 1, **document.pop("policies", {})}
    free = {key: None for key in ("idle_timeout", "max_runtime") if f"{key}_h" not in document}
    found = World(config_of(**{**free, **document}, policies=policies), container)
    found.look()
    return found
