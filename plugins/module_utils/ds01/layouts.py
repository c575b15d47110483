"""Named MIG layouts, in the format of NVIDIA's mig-parted (`version: v1`), whose files work as they are. Pure.

A layout is a list of entries; each says which GPUs it is for (`devices`: all or indices, narrowed by
`device-filter`) and how those are cut. A GPU that no entry is for stays as it is. Where mig-parted would apply
both of two entries for one GPU, the last winning, DS01 refuses.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import Ds01Error, invalid_input
from .mig import DIVIDED, LEFTOVER, Cut, GpuState, span
from .model import FULL

_PROFILE = re.compile(r"(\d+c\.)?\d+g\.\d+gb([+-][a-z.]+(,[a-z.]+)*)?")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_ID_FORM = "0x20B210DE"
_DIVIDED = "DS01 makes one compute instance over the whole GPU instance; write it without the 'c' part"
_FLAWS = {DIVIDED: "is divided into smaller compute instances", LEFTOVER: "has no compute instance"}


@dataclass(frozen=True)
class Entry:
    """How some GPUs are cut. `devices` are indices (None: all), `models` PCI device ids as NVML gives
    them, device << 16 | vendor (empty: any); `path` is the entry's place in the file. `problems`, each a place
    and a sentence, say why DS01 cannot make what the format allows: whoever asks for the entry is refused."""

    path: str
    cut: Cut
    devices: tuple[int, ...] | None = None
    models: tuple[int, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()

    def matches(self, gpu: GpuState) -> bool:
        """Whether the entry is for this GPU: `all` alone means all that have MIG."""
        if self.models and gpu.model_id not in self.models:
            return False
        if self.devices is not None:
            return gpu.index in self.devices
        return bool(self.models) or gpu.capable or not self.cut.enabled


Layouts = Mapping[str, Sequence[Entry]]


def parse(document: Mapping[str, Any]) -> Layouts:
    """The layouts of a document that the schema accepts, or Ds01Error `config_invalid` with the path.

    What only one layout suffers from is left to its `Entry.problems`: the others can be had.
    """
    return {
        str(name): tuple(_entry(raw, f"mig-configs.{name}.{number}") for number, raw in enumerate(entries))
        for name, entries in document["mig-configs"].items()
    }


def _bad(path: str, problem: str) -> Ds01Error:
    return Ds01Error("config_invalid", f"{path}: {problem}.")


def _entry(raw: Mapping[str, Any], path: str) -> Entry:
    enabled, wanted = raw["mig-enabled"], raw.get("mig-devices")
    if enabled and wanted is None:
        raise _bad(path, "mig-devices is missing; write mig-devices: {} for MIG mode without instances")
    if not enabled and wanted:
        raise _bad(f"{path}.mig-devices", "there can be no MIG devices where mig-enabled is false")
    names = tuple(_profiles(wanted or {}, f"{path}.mig-devices"))
    problems = tuple((f"{path}.mig-devices.{name}", _DIVIDED) for name in dict.fromkeys(names) if _is_divided(name))
    cut = Cut(enabled, names)
    devices = None if raw["devices"] == "all" else tuple(raw["devices"])
    filters = raw.get("device-filter") or ()
    listed = [filters] if isinstance(filters, str) else filters
    models = tuple(_model_id(text, f"{path}.device-filter") for text in listed)
    return Entry(path, cut, devices, models, problems)


def _profiles(wanted: Mapping[str, int], path: str) -> Iterable[str]:
    for name, count in wanted.items():
        _check_profile(name, f"{path}.{name}")
        yield from [name] * count


def _check_profile(name: str, path: str) -> None:
    if not _PROFILE.fullmatch(name):
        raise _bad(path, "this is not a MIG profile; they are written like 1g.10gb, 2g.20gb or 1g.10gb+me")


def _is_divided(name: str) -> bool:
    """Whether a profile is a compute instance's, one of several in a GPU instance."""
    return "c." in name


def _model_id(text: str, path: str) -> int:
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}", text):
        raise _bad(path, f"{text!r} is not a PCI device id; they are written like {_ID_FORM}")
    return int(text, 16)


def select(layouts: Layouts, name: str, gpus: Sequence[GpuState]) -> dict[int, Cut]:
    """How the layout wants each GPU, by index. Raises Ds01Error `config_invalid` where there is no such
    layout, two of its entries are for one GPU, none is for any, one is for a GPU that is not there, or DS01
    cannot make what it says."""
    if name not in layouts:
        raise invalid_input(f"There is no layout {name!r}.", f"There are: {', '.join(layouts)}.")
    for entry in layouts[name]:
        missing = _missing(entry, gpus)
        if missing:
            raise _bad(f"{entry.path}.devices", _not_there(missing, [gpu.index for gpu in gpus]))
    cuts: dict[int, Cut] = {}
    for gpu in gpus:
        entries = [entry for entry in layouts[name] if entry.matches(gpu)]
        if len(entries) > 1:
            raise _bad(entries[1].path, f"GPU {gpu.index} ({gpu.name}) is in {entries[0].path} already")
        if entries:
            for place, problem in entries[0].problems:
                raise _bad(place, problem)
            cuts[gpu.index] = entries[0].cut
    if not cuts:
        here = ", ".join(f"{gpu.index} ({gpu.name}, {model_text(gpu.model_id)})" for gpu in gpus)
        raise _bad(f"mig-configs.{name}", f"no entry is for a GPU of this host: {here or 'it has none'}")
    return cuts


def _missing(entry: Entry, gpus: Sequence[GpuState]) -> list[int]:
    """The GPUs that an entry names and this host does not have. One for other models only names none of its GPUs."""
    there = {gpu.index for gpu in gpus}
    ours = not entry.models or any(gpu.model_id in entry.models for gpu in gpus)
    return [index for index in entry.devices or () if ours and index not in there]


def _not_there(missing: Sequence[int], there: Sequence[int]) -> str:
    return f"there is no GPU {', '.join(map(str, missing))} here; there are: {', '.join(map(str, there)) or 'none'}"


def findings(layouts: Layouts, indices: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """What makes layouts of a valid file useless, each with its place: what DS01 cannot make, and where the
    GPUs' `indices` are known, those that are not there."""
    found: list[tuple[str, str]] = []
    for entry in (entry for entries in layouts.values() for entry in entries):
        found += [(place, f"{problem}.") for place, problem in entry.problems]
        missing = [i for i in entry.devices or () if indices is not None and not entry.models and i not in indices]
        if missing:
            found.append((f"{entry.path}.devices", f"{_not_there(missing, indices or ())}."))
    return found


def model_text(model_id: int) -> str:
    """A PCI device id as a device-filter has it: `0x20B210DE`."""
    return f"0x{model_id:08X}"


def cut_of(profiles: Iterable[str]) -> Cut:
    """A GPU cut into these profiles; none: MIG without instances, `full` alone: MIG off. Raises Ds01Error
    `invalid_input` for what is no profile."""
    found = tuple(profiles)
    if found == (FULL,):
        return Cut(False)
    for name in found:
        try:
            _check_profile(name, name)
        except Ds01Error as exc:
            raise invalid_input(exc.message) from None
        if _is_divided(name):
            raise invalid_input(f"{name}: {_DIVIDED}.")
    return Cut(True, found)


def filled(gpu: GpuState, profile: str) -> Cut:
    """The GPU cut into as many of one profile as it takes: the short form in the limits file (`mig_profile`)."""
    known = gpu.table.by_name.get(profile)
    return Cut(True, (profile,) * (known.most if known else 1))


def exported(gpus: Sequence[GpuState], name: str = "current") -> dict[str, Any]:
    """The live layout as a document that `parse` and mig-parted read. Left out is what neither would make:
    instances without a compute instance, or divided into several; and GPUs that are lost, of which nobody knows it."""
    alike: dict[tuple[bool, tuple[tuple[str, int], ...]], list[int]] = {}
    known = [gpu for gpu in gpus if gpu.health != "lost"]
    for gpu in known:
        counts = Counter(i.profile for i in gpu.instances if i.whole)
        alike.setdefault((gpu.mig, tuple(sorted(counts.items()))), []).append(gpu.index)
    entries = [
        {
            "devices": "all" if len(alike) == 1 and len(known) == len(gpus) else indices,
            "mig-enabled": mig,
            "mig-devices": dict(counts),
        }
        for (mig, counts), indices in alike.items()
    ]
    return {"version": "v1", "mig-configs": {name: entries}}


def left_out(gpus: Sequence[GpuState]) -> list[str]:
    """What `exported` leaves out, a sentence each."""
    lost = [gpu.index for gpu in gpus if gpu.health == "lost"]
    odd = [(gpu.index, i) for gpu in gpus for i in gpu.instances if i.flaw]
    return [
        *(f"GPU {index} is lost: how it is cut cannot be seen, and it is left out." for index in lost),
        *(f"{i.profile} at {span(*i.placement)} of GPU {n} {_FLAWS[i.flaw]}: it is left out." for n, i in odd),
    ]


def text(document: Mapping[str, Any]) -> str:
    """The document as a file, as mig-parted writes it."""
    lines = [f"version: {document['version']}", "mig-configs:"]
    for name, entries in document["mig-configs"].items():
        lines.append(f"  {_scalar(name)}:{'' if entries else ' []'}")
        for entry in entries:
            lines += [
                f"  - devices: {entry['devices'] if entry['devices'] == 'all' else json.dumps(entry['devices'])}",
                f"    mig-enabled: {json.dumps(entry['mig-enabled'])}",
                f"    mig-devices:{'' if entry['mig-devices'] else ' {}'}",
            ]
            lines += [f"      {_scalar(profile)}: {count}" for profile, count in entry["mig-devices"].items()]
    return "\n".join(lines) + "\n"


def _scalar(value: str) -> str:
    return value if _PLAIN.fullmatch(value) and not value[0].isdigit() else json.dumps(value)
