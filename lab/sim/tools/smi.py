"""nvidia-smi's stand-in: lists the GPUs as the real one does; everything else it refuses."""

import contextlib
import os
import sys

import nodes
import nvml
from state import DEFAULT, State, UsageError

HELP = """\
nvidia-smi of the simulated NVIDIA driver. It knows:
  nvidia-smi                       a short table
  nvidia-smi -L                    the GPUs and MIG devices with their UUIDs
  nvidia-smi --query-gpu=FIELD,... --format=csv[,noheader]
  nvidia-smi [-i GPU] -pm 0|1      persistence mode
"""
DRIVER_NOT_LOADED, MISMATCH = 9, 18


def _persistence_mode(driver, gpu):
    return "Enabled" if driver.number("nvmlDeviceGetPersistenceMode", gpu.handle) else "Disabled"


FIELDS = {
    "index": lambda _, gpu: gpu.index,
    "uuid": lambda _, gpu: gpu.uuid,
    "name": lambda _, gpu: gpu.name,
    "mig.mode.current": lambda _, gpu: gpu.mig_mode,
    "persistence_mode": _persistence_mode,
    "driver_version": lambda driver, _: driver.text("nvmlSystemGetDriverVersion"),
}


def _gpus(driver):
    """The GPUs that answer, and the worst code of those that do not."""
    found, code = [], 0
    for index in range(driver.count()):
        try:
            found.append(driver.gpu(index))
        except nvml.NvmlError as error:
            code = error.code
            sys.stdout.write(
                f"Unable to determine the device handle for GPU{index}: {error}."
                "  Reboot the system to recover this GPU\n"
            )
    return found, code


def _list(driver):
    gpus, code = _gpus(driver)
    for gpu in gpus:
        sys.stdout.write(f"GPU {gpu.index}: {gpu.name} (UUID: {gpu.uuid})\n")
        for mig in gpu.migs:
            sys.stdout.write(f"  MIG {mig.profile:<11} Device {mig.index:>2}: (UUID: {mig.uuid})\n")
    return code


def _table(driver):
    gpus, code = _gpus(driver)
    rule = "+" + "-" * 77 + "+\n"
    version = driver.text("nvmlSystemGetDriverVersion")
    sys.stdout.write(f"{rule}| {f'NVIDIA-SMI {version}   Driver Version: {version}   (simulated)':<76}|\n{rule}")
    for gpu in gpus:
        sys.stdout.write(f"| {f'{gpu.index:>3}  {gpu.name:<50} MIG {gpu.mig_mode}':<76}|\n")
    sys.stdout.write(rule)
    return code


def _query(driver, fields, header):
    gpus, code = _gpus(driver)
    if header:
        sys.stdout.write(", ".join(fields) + "\n")
    for gpu in gpus:
        sys.stdout.write(", ".join(str(FIELDS[field](driver, gpu)) for field in fields) + "\n")
    return code


def _persistence(driver, mode, only):
    for gpu in _gpus(driver)[0]:
        if only is not None and only not in (str(gpu.index), gpu.uuid):
            continue
        driver.call("nvmlDeviceSetPersistenceMode", gpu.handle, int(mode))
        sys.stdout.write(f"{'En' if mode == '1' else 'Dis'}abled persistence mode for GPU {gpu.index}.\n")
    sys.stdout.write("All done.\n")
    return 0


def _command(argv):
    """What to do with the driver, or None when the arguments make no sense."""
    if not argv:
        return _table
    if argv in (["-L"], ["--list-gpus"]):
        return _list
    only, rest = (argv[1], argv[2:]) if argv[0] == "-i" and len(argv) > 2 else (None, argv)
    if len(rest) == 2 and rest[0] in ("-pm", "--persistence-mode") and rest[1] in ("0", "1"):
        return lambda driver: _persistence(driver, rest[1], only)
    options = dict(argument.partition("=")[::2] for argument in argv)
    if options.keys() == {"--query-gpu", "--format"} and options["--format"] in ("csv", "csv,noheader"):
        fields = options["--query-gpu"].split(",")
        if all(field in FIELDS for field in fields):
            return lambda driver: _query(driver, fields, options["--format"] == "csv")
    return None


def main(argv):
    if argv in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
        return 0
    command = _command(argv)
    if command is None:
        sys.stderr.write(f"Invalid combination of input arguments: {' '.join(argv)}\n{HELP}")
        return 2
    try:
        with nvml.Nvml() as driver:
            # The real one has nvidia-modprobe make what is missing; only the installed state is /dev's.
            if os.geteuid() == 0 and not os.environ.get("NVML_SIM_STATE"):
                with contextlib.suppress(UsageError, OSError):
                    nodes.sync(State.read(DEFAULT))
            return command(driver)
    except nvml.NvmlError as error:
        if error.code == DRIVER_NOT_LOADED:
            sys.stdout.write(
                "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
                "Make sure that the latest NVIDIA driver is installed and running.\n\n"
            )
        else:
            where = "Failed to initialize NVML: " if error.code == MISMATCH else ""
            sys.stdout.write(f"{where}{error}\n")
        return error.code
