"""What a lab host's container must be to pass for a machine, as the body of the engine's create request."""

from collections.abc import Mapping, Sequence
from typing import Any

LABEL = "ds01.lab"  # carries the prefix; what has it is ours to remove
LABEL_INPUTS = "ds01.lab.inputs"
LABEL_GPUS = "ds01.lab.gpus"
LABEL_MIG = "ds01.lab.mig"

ADDRESS = "127.0.0.1"  # nobody but this machine reaches a lab host
SSH = "22/tcp"
INIT = "/usr/local/sbin/ds01-lab-init"

# What systemd, an inner engine and a login need beyond Docker's usual set. Neither `Privileged` nor ALL: both ask for
# CAP_SYS_RESOURCE, which virtual machines may lack, and how one takes it out again depends on Docker's version.
CAPABILITIES = (
    "SYS_ADMIN",  # mounts, cgroups, device filters
    "NET_ADMIN",  # the inner bridge and its packet filter
    "SYS_BOOT",  # systemctl reboot
    "SYS_PTRACE",
    "SYS_NICE",
    "SYS_TTY_CONFIG",
    "IPC_LOCK",
    "IPC_OWNER",
    "DAC_READ_SEARCH",
    "LEASE",
    "LINUX_IMMUTABLE",
    "NET_BROADCAST",
    "AUDIT_CONTROL",
    "SYSLOG",
)

# systemd 257 takes cgroup v1 only when its kernel command line says so, and a container has no other one.
LEGACY_CGROUP = "systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"


def environment(cgroup_version: str) -> list[str]:
    """What systemd is told: that it runs in a container, and on cgroup v1 to put up with that."""
    return ["container=docker", *([f"SYSTEMD_PROC_CMDLINE={LEGACY_CGROUP}"] if cgroup_version == "1" else [])]


def machine(image: str, cgroup_version: str) -> dict[str, Any]:
    """What is the same for every lab host."""
    return {
        "Image": image,
        "Cmd": [INIT],
        "Env": environment(cgroup_version),
        "StopSignal": "SIGRTMIN+3",  # systemd's word for an orderly shutdown
        "ExposedPorts": {SSH: {}},
        "HostConfig": {
            "CapAdd": list(CAPABILITIES),
            "SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined"],
            # Empty: systemd and the inner engine write to what Docker would hide.
            "MaskedPaths": [],
            "ReadonlyPaths": [],
            "DeviceCgroupRules": ["a *:* rwm"],
            # With the machine's own cgroups mounted in, `docker exec` fails in the containers inside.
            "CgroupnsMode": "private",
            "Tmpfs": {"/run": "exec", "/tmp": "exec"},  # noqa: S108 a mount point inside the host
            # The inner engine's overlays cannot lie on an overlay: its data needs a volume.
            "Mounts": [{"Type": "volume", "Target": "/var/lib/docker"}],
            # `systemctl reboot` inside ends the container; this makes it come back, as a machine does.
            "RestartPolicy": {"Name": "unless-stopped"},
        },
    }


def host(
    machine: Mapping[str, Any], prefix: str, name: str, port: int, gpus: str, mig: Sequence[str], inputs: str
) -> dict[str, Any]:
    """One lab host. Its labels say what it is, so that the lab needs no records of its own."""
    return {
        **machine,
        "Hostname": name,
        "Labels": {LABEL: prefix, LABEL_GPUS: gpus, LABEL_MIG: " ".join(mig), LABEL_INPUTS: inputs},
        "HostConfig": {
            **machine["HostConfig"],
            "PortBindings": {SSH: [{"HostIp": ADDRESS, "HostPort": str(port)}]},
        },
    }
