"""nvidia-ctk's stand-in: the CDI specification and the /dev/char links for the simulated GPUs."""

import argparse
import json
import os
import re
import stat
import sys
from pathlib import Path

import nodes
import nvml
from state import UsageError

VERSION = "1.17.8"
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")
SPEC_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))


def _warn(text):
    sys.stderr.write(f'level=warning msg="{text}"\n')


def _yaml(value, indent=""):
    """Enough YAML for a CDI specification: dicts, lists and texts."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z/][\w./-]*", value) else json.dumps(value)
    lines = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        head = f"{indent}{key}:" if isinstance(value, dict) else f"{indent}-"
        text = _yaml(item, indent + "  ")
        if isinstance(item, str):
            lines.append(f"{head} {text}")
        elif isinstance(value, dict):
            lines.append(f"{head}\n{text}")
        else:  # a list's item begins on the dash's own line
            lines.append(f"{head} {text.lstrip()}")
    return "\n".join(lines)


class _Spec:
    def __init__(self, dev_root):
        self.dev_root = dev_root

    def edits(self, paths):
        """Device nodes, those that exist: as with the real tool, a missing one costs a warning and no more."""
        found = []
        for path in paths:
            host = self.dev_root / path.lstrip("/")
            if not host.exists():
                _warn(f"Could not locate {path}: pattern {path} not found")
                continue
            found.append({"path": path} if host == Path(path) else {"path": path, "hostPath": str(host)})
        return {"deviceNodes": found} if found else {}

    def devices(self, driver, strategies):
        by_name, everything = {}, []
        for index in range(driver.count()):
            try:
                gpu = driver.gpu(index)
            except nvml.NvmlError as error:
                raise UsageError(f"error getting device handle for index '{index}': {error}") from None
            entries = [(str(mig.index), mig.uuid, nodes.mig_nodes(gpu.minor, mig.gi, mig.ci)) for mig in gpu.migs]
            if gpu.mig_mode != "Enabled":
                entries = [(None, gpu.uuid, [nodes.gpu_node(gpu.minor)])]
            for mig, uuid, paths in entries:
                edits = self.edits(paths)
                if not edits:  # an empty device would make the whole specification invalid
                    continue
                everything += [node for node in edits["deviceNodes"] if node not in everything]
                if "index" in strategies:
                    by_name[f"{index}:{mig}" if mig else str(index)] = edits
                if "type-index" in strategies:
                    by_name[f"mig{index}:{mig}" if mig else f"gpu{index}"] = edits
                if "uuid" in strategies:
                    by_name[uuid] = edits
        if by_name:
            by_name["all"] = {"deviceNodes": everything}
        return [{"name": name, "containerEdits": edits} for name, edits in by_name.items()]

    def common(self):
        edits = {"env": ["NVIDIA_VISIBLE_DEVICES=void"]}
        edits |= self.edits(["/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidiactl"])
        files = [*(f"{folder}/libnvidia-ml.so.1" for folder in LIBRARY_FOLDERS), "/usr/bin/nvidia-smi"]
        mounts = [
            {"hostPath": file, "containerPath": file, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}
            for file in files
            if Path(file).exists()
        ]
        return edits | ({"mounts": mounts} if mounts else {})


def generate(arguments):
    spec = _Spec(arguments.dev_root)
    with nvml.Nvml() as driver:
        devices = spec.devices(driver, arguments.device_name_strategy or ["index", "uuid"])
    if not devices:
        raise UsageError("no devices were found")
    content = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": spec.common()}
    implied = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}.get(Path(arguments.output).suffix)
    kind = arguments.format or implied or "yaml"
    text = json.dumps(content, indent=2) + "\n" if kind == "json" else f"---\n{_yaml(content)}\n"
    if not arguments.output:
        sys.stdout.write(text)
        return
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f".{output.name}.new")  # a reader never sees half a specification
    new.write_text(text)
    new.replace(output)
    sys.stderr.write('level=info msg="Generated CDI spec with version 0.5.0"\n')


def _names(path):
    text = path.read_text()
    if path.suffix == ".json":
        spec = json.loads(text)
        return [f"{spec['kind']}={device['name']}" for device in spec["devices"]]
    kind = re.search(r"^kind: *[\"']?([^\s\"']+)", text, re.MULTILINE)
    names = re.findall(r"^ *- name: *[\"']?([^\s\"']+)", text, re.MULTILINE)
    return [f"{kind[1]}={name}" for name in names] if kind else []


def list_devices(arguments):
    folders = arguments.spec_dir or SPEC_FOLDERS
    specs = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in (".json", ".yaml")]
    found = sorted({name for path in specs for name in _names(path)})
    sys.stderr.write(f'level=info msg="Found {len(found)} CDI devices"\n')
    sys.stdout.writelines(f"{name}\n" for name in found)


def link_nodes(arguments):
    """/dev/char/<major>:<minor> for every NVIDIA node: runc asks for a device under that name."""
    dev = arguments.dev_root / "dev"
    folder = arguments.dev_char_path or dev / "char"
    folder.mkdir(parents=True, exist_ok=True)
    for node in sorted([*dev.glob("nvidia*"), *dev.glob("nvidia-caps/*")]):
        status = node.lstat()
        if not stat.S_ISCHR(status.st_mode):
            continue
        link = folder / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if link.is_symlink() and link.resolve() == node.resolve():
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(node)
        sys.stderr.write(f'level=info msg="Creating link {link} => {node}"\n')


def _parser():
    parser = argparse.ArgumentParser(prog="nvidia-ctk", description="nvidia-ctk of the simulated NVIDIA driver.")
    version = f"NVIDIA Container Toolkit CLI version {VERSION}\ncommit: simulated"
    parser.add_argument("--version", action="version", version=version)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the version's two lines
    groups = parser.add_subparsers(required=True, metavar="COMMAND")

    cdi = groups.add_parser("cdi").add_subparsers(required=True, metavar="COMMAND")
    verb = cdi.add_parser("generate", help="write the CDI specification")
    verb.add_argument("--output", default="", help="a file; else the standard output")
    verb.add_argument("--format", choices=("yaml", "json"))
    verb.add_argument("--mode", choices=("auto", "nvml"), default="auto")
    verb.add_argument("--device-name-strategy", choices=("index", "uuid", "type-index"), action="append")
    verb.add_argument("--dev-root", type=Path, default=Path("/"), help="the folder that has dev/")
    verb.set_defaults(run=generate)
    verb = cdi.add_parser("list", help="the devices that specifications name")
    verb.add_argument("--spec-dir", type=Path, action="append")
    verb.set_defaults(run=list_devices)

    system = groups.add_parser("system").add_subparsers(required=True, metavar="COMMAND")
    verb = system.add_parser("create-dev-char-symlinks", help="links in /dev/char to the device nodes")
    verb.add_argument("--create-all", action="store_true", required=True)
    verb.add_argument("--dev-char-path", type=Path)
    verb.add_argument("--dev-root", type=Path, default=Path("/"))
    verb.set_defaults(run=link_nodes)
    return parser


def main(argv):
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (UsageError, nvml.NvmlError, OSError) as error:
        sys.stderr.write(f'level=error msg="{error}"\n')
        return 1
    return 0
