"""nvml-sim: set up the simulated machine, and do to it what happens to real ones."""

import argparse
import hashlib
import itertools
import json
import os
import secrets
import sys
from pathlib import Path

import faults
import nodes
import nvml
from state import State, UsageError, default_path, edit, lock

BUSES = (0x07, 0x0F, 0x47, 0x4E, 0x87, 0x90, 0xB7, 0xBD, 0xC1, 0xC6, 0xCB, 0xD0, 0xD5, 0xDA, 0xDF, 0xE4)

EXAMPLES = """\
examples:
  nvml-sim init /tmp/gpus --gpus 4xA100-SXM4-80GB --mig 1=2g.20gb,2g.20gb,2g.20gb --unprivileged
  nvml-sim init /tmp/gpus --gpus 2xA100-SXM4-40GB,1xH100-SXM5-80GB --mig 2=
  nvml-sim set /tmp/gpus lost=2 process=1.0:4711:2000
  nvml-sim set /tmp/gpus reboot
  nvml-sim show /tmp/gpus --json
  LD_LIBRARY_PATH=build/sim NVML_SIM_STATE=/tmp/gpus python3 -c 'import pynvml; ...'

A GPU is written by its index, a MIG device as GPU:MIG index (GPU.MIG where a PID follows).
"""

CHANGES = """\
changes, and what takes them back:
  lost=2                  found=2           the GPU falls off the bus
  busy=1:0  busy=0        idle=1:0          some client holds it
  process=0:PID[:MiB[:C|G|M]]  exit=0:PID   a process runs on it (0.1:PID: on a MIG device)
  xid=1:79                                  an Xid event; 79 also loses the GPU, 63 and 64 remap rows
  remap-pending=0  remap-failed=0  retired=0:N  ecc-corrected=0:N  ecc-uncorrected=0:N    healthy=0
  utilization=0:35  temperature=0:80
  gap=1:0                 no-gap=1:0        nothing at this MIG index: the devices move up
  swap=0:1                swap=0:1          two GPUs change their indices
  reset=0                                   no instances; a pending MIG mode comes into force
  passthrough=0           bare-metal=0      a MIG mode change waits for a reboot (models that need a reset)
  slow=SECONDS            slow=0            init and every change take that long
  hang=init|call|change   hang=none         nvmlInit, every other call, or every change does not return
  loaded=off  version-mismatch=on           the driver as a whole
  permit=any              permit=root       who may change GPUs
  reboot                                    no instances; MIG mode stays only where the GPU stores it
"""


def _digest(seed, *words):
    return hashlib.sha256("/".join(map(str, (seed, *words))).encode()).hexdigest()


def _gpu(seed, minor, model):
    h = _digest(seed, "gpu", minor)
    return {
        "minor": str(minor),
        "model": model,
        "uuid": f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:32]}",
        "pci": f"00000000:{BUSES[minor]:02X}:00.0",
        "mig": "0",
        "pending": "0",
        "serial": f"13{int(h[32:48], 16) % 10**11:011d}",
        "temperature": str(30 + minor),
    }


def _models(text):
    """`4xA100-SXM4-80GB,1xH100-SXM5-80GB` as a list with one name a GPU."""
    library = nvml.library()
    known = []
    while name := library.nvmlSimModel(len(known)):
        known.append(name.decode())
    found = []
    for part in filter(None, text.split(",")):
        count, cross, model = part.partition("x")
        count, model = (count, model) if cross and count.isdigit() else ("1", part)
        if model not in known:
            raise UsageError(f"There is no model {model!r}; there are {', '.join(known)}.")
        found += [model] * int(count)
    if len(found) > len(BUSES):
        raise UsageError(f"A machine has at most {len(BUSES)} GPUs, not {len(found)}.")
    return found


def _layout(text, gpus):
    index, equals, profiles = text.partition("=")
    if not equals or not index.isdigit() or int(index) >= gpus:
        raise UsageError(f"--mig {text!r} is not of the form GPU=PROFILE,PROFILE,... for a GPU below {gpus}.")
    return int(index), [profile for profile in profiles.split(",") if profile]


def _arrange(choices, taken=frozenset()):
    """A place for each instance, in order, so that none overlap; None where there is no such arrangement."""
    if not choices:
        return []
    for start, size in choices[0]:
        slices = frozenset(range(start, start + size))
        if taken & slices:
            continue
        rest = _arrange(choices[1:], taken | slices)
        if rest is not None:
            return [(start, size), *rest]
    return None


def _cut(driver, index, names):
    gpu = driver.gpu(index)
    if gpu.mig_mode != "Enabled":
        raise UsageError(f"GPU {index} ({gpu.name}) has no MIG.")
    known = driver.profiles(gpu.handle)
    for name in names:
        if name not in known:
            raise UsageError(f"GPU {index} has no profile {name!r}; it has {', '.join(known)}.")
    wanted = [known[name] for name in names]
    places = _arrange([driver.placements(gpu.handle, profile) for profile, _ in wanted])
    if places is None:
        raise UsageError(f"{', '.join(names)} do not fit on GPU {index} together.")
    for (profile, slices), place in zip(wanted, places, strict=True):
        try:
            driver.create_mig(gpu.handle, profile, slices, place)
        except nvml.NvmlError as error:
            raise UsageError(f"{', '.join(names)} do not fit on GPU {index} together: {error}.") from None


def init(arguments):
    """A new machine, built beside the old one and put in its place when it is complete."""
    seed = secrets.randbits(62) if arguments.seed is None else arguments.seed
    models = _models(arguments.gpus)
    layouts = dict(_layout(text, len(models)) for text in arguments.mig)
    state = State()
    state.records["driver"] = [
        {
            "version": arguments.driver_version,
            "loaded": "1",
            "mismatch": "0",
            "permit_any": "1",
            "boot": "1",
            "seed": str(seed),
            "next": "1",
        }
    ]
    state.records["gpu"] = [_gpu(seed, minor, model) for minor, model in enumerate(models)]
    for index in layouts:
        state.gpus[index] |= {"mig": "1", "pending": "1"}

    path = arguments.state
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.init")
    try:
        state.write(draft)
        os.environ["NVML_SIM_STATE"] = str(draft)
        with nvml.Nvml() as driver:
            for index, names in layouts.items():
                _cut(driver, index, names)
        state = State.read(draft)
        state.driver["permit_any"] = "1" if arguments.unprivileged or os.geteuid() != 0 else "0"
        with lock(path):
            state.write(path)
    finally:
        draft.unlink(missing_ok=True)
        Path(f"{draft}.lock").unlink(missing_ok=True)


def change(arguments):
    """All of the changes up to a reboot, or none of them."""
    for reboots, texts in itertools.groupby(arguments.change, key="reboot".__eq__):
        if reboots:
            os.environ["NVML_SIM_STATE"] = str(arguments.state)
            if nvml.library().nvmlSimReboot():
                raise UsageError(f"{arguments.state} cannot be rebooted: it is not a state file.")
            continue
        with edit(arguments.state) as state:
            for text in texts:
                faults.apply(state, text)


def _picture(state):
    library = nvml.library()

    def instance(gpu, gi):
        return {
            "id": int(gi["id"]),
            "profile": library.nvmlSimProfile(gpu["model"].encode(), int(gi["profile"])).decode(),
            "start": int(gi["start"]),
            "compute_instances": [
                {"id": int(ci["id"]), "uuid": ci["uuid"], "busy": ci.get("busy") == "1"}
                for ci in state.of("ci", gpu)
                if ci["gi"] == gi["id"]
            ],
        }

    return {
        "driver": state.driver,
        "gpus": [
            {
                "index": index,
                **gpu,
                "gpu_instances": [instance(gpu, gi) for gi in state.of("gi", gpu)],
                "processes": state.of("process", gpu),
                "xids": [int(xid["code"]) for xid in state.of("xid", gpu)],
            }
            for index, gpu in enumerate(state.gpus)
        ],
    }


def show(arguments):
    picture = _picture(State.read(arguments.state))
    if arguments.json:
        sys.stdout.write(json.dumps(picture, indent=2) + "\n")
        return
    driver, plain = picture["driver"], ("minor", "model", "uuid", "pci", "serial", "temperature", "index")
    sys.stdout.write(f"driver {driver['version']}, boot {driver['boot']}\n")
    for gpu in picture["gpus"]:
        flags = [f"{k}={v}" for k, v in gpu.items() if isinstance(v, str) and k not in plain and v != "0"]
        sys.stdout.write(" ".join([f"GPU {gpu['index']}: {gpu['model']} {gpu['uuid']}", *flags]) + "\n")
        for gi in gpu["gpu_instances"]:
            uuids = [ci["uuid"] + (" busy" if ci["busy"] else "") for ci in gi["compute_instances"]]
            sys.stdout.write(f"  {gi['profile']} at {gi['start']}, id {gi['id']}: {', '.join(uuids) or 'empty'}\n")
        for process in gpu["processes"]:
            sys.stdout.write(f"  process {process['pid']} {process['mib']} MiB\n")
        for code in gpu["xids"]:
            sys.stdout.write(f"  Xid {code}\n")


def make_nodes(arguments):
    made, removed = nodes.sync(State.read(arguments.state), arguments.root)
    for verb, paths in (("made", made), ("removed", removed)):
        sys.stdout.writelines(f"{verb} {path}\n" for path in paths)


def _parser():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="nvml-sim", description="A simulated NVIDIA driver's machine.", epilog=EXAMPLES, formatter_class=raw
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("init", help="write a new machine", epilog=EXAMPLES, formatter_class=raw)
    verb.add_argument("state", type=Path)
    verb.add_argument("--gpus", required=True, help="models with counts: 4xA100-SXM4-80GB,1xL40S-48GB")
    verb.add_argument("--mig", action="append", default=[], metavar="GPU=PROFILE,...", help="MIG on, and cut so")
    verb.add_argument("--driver-version", default="580.95.05")
    verb.add_argument("--seed", type=int, help="the same seed gives the same UUIDs")
    verb.add_argument("--unprivileged", action="store_true", help="anybody may change GPUs, not only root")
    verb.set_defaults(run=init)

    verb = verbs.add_parser("set", help="do something to it", epilog=CHANGES, formatter_class=raw)
    verb.add_argument("state", type=Path)
    verb.add_argument("change", nargs="+")
    verb.set_defaults(run=change)

    verb = verbs.add_parser("show", help="what there is")
    verb.add_argument("state", type=Path, nargs="?", default=default_path())
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(run=show)

    verb = verbs.add_parser("nodes", help="make /dev agree with it, as nvidia-modprobe does")
    verb.add_argument("state", type=Path, nargs="?", default=default_path())
    verb.add_argument("--root", type=Path, default=Path("/"), help="the folder that has dev/")
    verb.set_defaults(run=make_nodes)
    return parser


def main(argv):
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (UsageError, nvml.NvmlError, OSError) as error:
        sys.stderr.write(f"nvml-sim: {error}\n")
        return 2
    return 0
