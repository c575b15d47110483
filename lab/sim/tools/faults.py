"""`nvml-sim set`: what happens to real GPUs, done to simulated ones."""

from state import UsageError

# What the driver reports in the same moment as these Xids.
XID_MEANS = {"79": {"lost": "1"}, "63": {"remap_pending": "1"}, "64": {"remap_failed": "1"}}


MOST = 200  # of one kind in a state; the library reads some more


def _split(value, form, least, most):
    parts = value.split(":")
    if not least <= len(parts) <= most or not all(parts):
        raise UsageError(f"{value!r} is not of the form {form}.")
    return parts


def _number(text):
    if not text.isdigit():
        raise UsageError(f"{text!r} is not a whole number.")
    return text


def _switch(value):
    if value not in ("on", "off"):
        raise UsageError(f"Say on or off, not {value!r}.")
    return "1" if value == "on" else "0"


def _flag(key, value):
    """A change that only raises or lowers one flag of a GPU."""

    def change(state, gpu):
        state.gpu(gpu)[key] = value

    return change


def _level(key):
    def change(state, value):
        gpu, level = _split(value, "GPU:NUMBER", 2, 2)
        state.gpu(gpu)[key] = _number(level)

    return change


def _driver(key, convert):
    def change(state, value):
        state.driver[key] = convert(value)

    return change


def _milliseconds(value):
    try:
        return str(round(float(value) * 1000))
    except ValueError:
        raise UsageError(f"{value!r} is not a number of seconds.") from None


def _hang(value):
    kinds = ("none", "init", "call", "change")  # the library's enum hang
    if value not in kinds:
        raise UsageError(f"Say {', '.join(kinds[1:])} or none, not {value!r}.")
    return str(kinds.index(value))


def _permit(value):
    if value not in ("root", "any"):
        raise UsageError(f"Say root or any, not {value!r}.")
    return "1" if value == "any" else "0"


def _busy(value):
    def change(state, device):
        gpu, *mig = _split(device.replace(".", ":"), "GPU or GPU:MIG", 1, 2)
        target = state.gpu(gpu)
        (state.mig(target, mig[0]) if mig else target)["busy"] = value

    return change


def _process(state, value):
    device, pid, *more = _split(value, "GPU:PID[:MiB[:TYPE]], with GPU.MIG for a MIG device", 2, 4)
    gpu, _, mig = device.partition(".")
    target = state.gpu(gpu)
    instance = state.mig(target, mig) if mig else {"gi": "-", "id": "-"}
    if target.get("mig") == "1" and not mig:
        raise UsageError(f"GPU {gpu} is in MIG mode: a process runs on one of its devices, {gpu}.0 for example.")
    mib = more[0] if more else "0"
    kind = more[1] if len(more) > 1 else "C"
    if kind not in ("C", "G", "M"):
        raise UsageError(f"A process is of type C (compute), G (graphics) or M (MPS), not {kind!r}.")
    if len(state.records["process"]) >= MOST:
        raise UsageError(f"A machine has at most {MOST} processes.")
    state.records["process"].append(
        {
            "gpu": target["minor"],
            "gi": instance["gi"],
            "ci": instance["id"],
            "pid": _number(pid),
            "mib": _number(mib),
            "type": kind,
        }
    )


def _exit(state, value):
    gpu, pid = _split(value, "GPU:PID", 2, 2)
    minor, before = state.gpu(gpu.partition(".")[0])["minor"], len(state.records["process"])
    state.records["process"] = [
        process for process in state.records["process"] if (process["gpu"], process["pid"]) != (minor, pid)
    ]
    if len(state.records["process"]) == before:
        raise UsageError(f"GPU {gpu} has no process {pid}.")


def _xid(state, value):
    gpu, code = _split(value, "GPU:XID", 2, 2)
    target, number = state.gpu(gpu), int(state.driver["next"])
    state.driver["next"] = str(number + 1)
    xid = {"gpu": target["minor"], "code": _number(code), "number": str(number)}
    state.records["xid"] = [*state.records["xid"], xid][-MOST:]
    target.update(XID_MEANS.get(code, {}))


def _gap(is_gap):
    def change(state, value):
        gpu, index = _split(value, "GPU:MIG", 2, 2)
        target, bit = state.gpu(gpu), 1 << int(_number(index))
        holes = int(target.get("holes", "0"))
        target["holes"] = str(holes | bit if is_gap else holes & ~bit)

    return change


def _swap(state, value):
    one, other = _split(value, "GPU:GPU", 2, 2)
    first, second = state.gpus.index(state.gpu(one)), state.gpus.index(state.gpu(other))
    state.gpus[first], state.gpus[second] = state.gpus[second], state.gpus[first]


def _reset(state, gpu):
    target = state.gpu(gpu)
    if target.get("busy") == "1" or state.of("process", target):
        raise UsageError(f"GPU {gpu} cannot be reset: a client holds it.")
    target["mig"] = target["pending"]
    for kind in ("gi", "ci"):
        state.records[kind] = [record for record in state.records[kind] if record["gpu"] != target["minor"]]


def _heal(state, gpu):
    worn = ("remap_corrected", "remap_uncorrected", "remap_pending", "remap_failed", "retired", "retired_pending")
    state.gpu(gpu).update(dict.fromkeys((*worn, "ecc_corrected", "ecc_uncorrected"), "0"))


CHANGES = {
    "lost": _flag("lost", "1"),
    "found": _flag("lost", "0"),
    "busy": _busy("1"),
    "idle": _busy("0"),
    "process": _process,
    "exit": _exit,
    "xid": _xid,
    "remap-pending": _flag("remap_pending", "1"),
    "remap-failed": _flag("remap_failed", "1"),
    "retired": _level("retired"),
    "ecc-corrected": _level("ecc_corrected"),
    "ecc-uncorrected": _level("ecc_uncorrected"),
    "healthy": _heal,
    "utilization": _level("utilization"),
    "temperature": _level("temperature"),
    "reset": _reset,
    "passthrough": _flag("passthrough", "1"),
    "bare-metal": _flag("passthrough", "0"),
    "gap": _gap(True),
    "no-gap": _gap(False),
    "swap": _swap,
    "slow": _driver("slow_ms", _milliseconds),
    "hang": _driver("hangs", _hang),
    "loaded": _driver("loaded", _switch),
    "version-mismatch": _driver("mismatch", _switch),
    "driver-version": _driver("version", str),
    "permit": _driver("permit_any", _permit),
}


def apply(state, change):
    """Carry out one `key=value`."""
    key, equals, value = change.partition("=")
    if key not in CHANGES or not equals or not value or value.split() != [value]:
        raise UsageError(f"{change!r} is no change; there are reboot and {', '.join(f'{k}=' for k in CHANGES)}.")
    CHANGES[key](state, value)
