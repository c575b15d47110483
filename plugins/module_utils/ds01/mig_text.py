"""What `ds01 mig` prints for people: maps of the GPUs' slices, what still fits, plans. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import mig, slotmap, terminal
from .mig import GpuState, Instance, Plan
from .slotmap import Block

if TYPE_CHECKING:
    from .partitions import Planned

_MARGIN = "  "
_INSTANCES = {
    "id": "Device",
    "profile": "Profile",
    "place": "Slices",
    "status": "State",
    "user": "User",
    "container": "Container",
    "until": "Until",
}
_SIGNS = {mig.CREATE: "+", mig.DESTROY: "-", mig.ENABLE: "+", mig.DISABLE: "-"}


def list_text(listing: Mapping[str, Any]) -> str:
    """`ds01 mig list`, from its JSON form."""
    parts = []
    for gpu in listing["gpus"]:
        rows = [row for row in listing["instances"] if row["gpu"] == gpu["index"]]
        parts.append("\n".join(_gpu_lines(gpu, rows)))
    if listing["instances"]:
        rows = [{**row, "place": mig.span(*row["placement"])} for row in listing["instances"]]
        parts.append(terminal.table(rows, _INSTANCES))
    used = [f"{row['id']} is used by {row['occupied_by']}." for row in listing["instances"] if row["occupied_by"]]
    parts.extend(["\n".join(used)] if used else [])
    problems = [f"Not everything could be seen: {problem['msg']}" for problem in listing["problems"]]
    return "\n\n".join([*parts, *problems]) or "This host has no GPU."


def _gpu_lines(gpu: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"GPU {gpu['index']}  {gpu['name']}, {_mode(gpu)}"
    for user in gpu["in_use_by"]:
        yield f"{_MARGIN}used as a whole by {user}"
    if not gpu["mig"] and gpu["profiles"]:
        most = ", ".join(f"{count} x {name}" for name, count in gpu["profiles"].items())
        yield f"{_MARGIN}with MIG on up to: {most}"
    if not gpu["mig"] or not gpu["memory_slices"]:
        return
    for line in slotmap.draw(gpu["memory_slices"], _blocks(rows)):
        yield _MARGIN + line
    fits = ", ".join(f"{name} at {_or(starts)}" for name, starts in gpu["possible"].items())
    yield f"{_MARGIN}fits beside: {fits}" if fits else f"{_MARGIN}nothing more fits"


def _mode(gpu: Mapping[str, Any]) -> str:
    if gpu["health"] == "lost":
        return "lost"
    if not gpu["mig_capable"]:
        return "no MIG"
    pending = gpu["mig_pending"]
    after = "" if pending is None else f" ({'on' if pending else 'off'} after the next reset)"
    return f"MIG {'on' if gpu['mig'] else 'off'}{after}"


def _blocks(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A block for each GPU instance: of one that is divided, its rows together. What is missing has none."""
    found: dict[tuple[int, int], Block] = {}
    for row in (row for row in rows if row["status"] != "missing"):
        start, size = row["placement"]
        owner = row["user"] or row["status"]
        if row["status"] == "held":
            owner += " (held)"
        found.setdefault((start, size), Block(start, size, row["profile"], owner))
    return list(found.values())


def _or(starts: Sequence[int]) -> str:
    *first, last = map(str, starts)
    return f"{', '.join(first)} or {last}" if first else last


def plan_text(planned: Planned) -> str:
    """`ds01 mig plan`: of every GPU that changes the slices before and after, and the operations."""
    by_index = {gpu.index: gpu for gpu in planned.host.gpus}
    parts = ["\n".join(_plan_lines(by_index[plan.gpu], plan)) for plan in planned.plans]
    meanwhile = [f"stopped meanwhile: {', '.join(planned.services)}"] if planned.services else []
    also = list(_also_lost(planned))
    over = [f"given back: {container}: {why}" for container, why in planned.given_back.items()]
    return "\n\n".join([*parts, *also, *meanwhile, *over, *(f"also put right: {repair}" for repair in planned.repairs)])


def _also_lost(planned: Planned) -> Iterator[str]:
    """What the containers that are named in `force` have on GPUs that stay as they are."""
    named = {(plan.gpu, i.placement) for plan in planned.plans for i in plan.broken}
    for container in planned.released:
        devices = planned.host.ledger.allocations[container].devices
        others = [d.id for d in devices if (d.index[0], d.placement) not in named]
        if others:
            yield f"{container} gives back {', '.join(others)}, too: it has all of its devices or none"


def _plan_lines(gpu: GpuState, plan: Plan) -> Iterator[str]:
    if not plan.changes:
        yield f"{_title(gpu)}: as wanted, nothing to do"
        return
    yield _title(gpu)
    yield from _titled("now", _map(gpu, _now(gpu)))
    yield from _titled("then", _map(gpu, _then(gpu, plan)))
    for step in plan.changes:
        yield f"{_MARGIN}{_SIGNS[step.action]} {step}{f'  ({step.uuid})' if step.uuid else ''}"
    yield from (
        f"{_MARGIN}! this takes {i.profile} at {mig.span(*i.placement)} from {h}"
        for i in plan.broken
        for h in i.holders
    )


def difference(planned: Planned) -> list[dict[str, str]]:
    """Of every GPU that changes its slices before and after with who has them, as Ansible shows differences;
    then who loses devices, what stops meanwhile, and what else is put right."""
    by_index = {gpu.index: gpu for gpu in planned.host.gpus}
    found = [_difference(by_index[plan.gpu], plan) for plan in planned.plans if plan.changes]
    gone = [*_forced(planned), *(f"{container}: {why}" for container, why in planned.given_back.items())]
    meanwhile = [f"{unit} stops, and starts again" for unit in planned.services]
    for title, before, after in (
        ("given back", gone, ()),
        ("meanwhile", (), meanwhile),
        ("put right", planned.repairs, ()),
    ):
        if before or after:
            found.append(_as_difference(title, _lines(before), _lines(after)))
    return found


def _forced(planned: Planned) -> Iterator[str]:
    for container in planned.released:
        yield f"{container} has {planned.host.ledger.allocations[container].gpu_id} (force)"


def _lines(sentences: Iterable[str]) -> str:
    return "".join(f"{sentence}\n" for sentence in sentences)


def _difference(gpu: GpuState, plan: Plan) -> dict[str, str]:
    before, after = ("\n".join(_map(gpu, blocks)) + "\n" for blocks in (_now(gpu), _then(gpu, plan)))
    return _as_difference(_title(gpu), before, after)


def _title(gpu: GpuState) -> str:
    waits = f", MIG {'on' if gpu.pending else 'off'} after the next reset" if gpu.mode_pending else ""
    return f"GPU {gpu.index}  {gpu.name}{waits}"


def _as_difference(title: str, before: str, after: str) -> dict[str, str]:
    return {"before_header": title, "after_header": title, "before": before, "after": after}


def _map(gpu: GpuState, blocks: Sequence[Block] | None) -> list[str]:
    """None: a whole GPU."""
    return ["MIG off: a whole GPU"] if blocks is None else slotmap.draw(gpu.table.width, blocks)


def _titled(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The title before the first line."""
    for number, line in enumerate(lines):
        yield f"{_MARGIN}{title if number == 0 else '':<5} {line}"


def _now(gpu: GpuState) -> list[Block] | None:
    return [_block(i) for i in gpu.instances] if gpu.mig else None


def _then(gpu: GpuState, plan: Plan) -> list[Block] | None:
    off = any(step.action == mig.DISABLE for step in plan.steps)
    return None if off else list(_after(gpu, plan))


def _block(instance: Instance) -> Block:
    return Block(instance.start, instance.size, instance.profile, _owner(instance))


def _owner(instance: Instance) -> str:
    if instance.holders:
        first = instance.holders[0]
        return first.user if first.container else "in use"
    return instance.flaw or "free"


def _after(gpu: GpuState, plan: Plan) -> Iterator[Block]:
    there = {i.placement: i for i in gpu.instances}
    back = {i.key: _owner(i) for i in gpu.missing}
    for step in plan.steps:
        if step.placement and step.action == mig.KEEP:
            yield _block(there[step.placement])
        elif step.placement and step.action == mig.CREATE:
            owner = back.get((step.profile, step.placement[0]), "new")
            yield Block(*step.placement, step.profile, owner)
