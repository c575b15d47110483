"""The private engine's own bridge: two engines on one machine must not share docker0."""

import ipaddress
import os
from pathlib import Path

from .shell import as_root, run

BRIDGE = os.environ.get("DS01_LAB_BRIDGE", "ds01-lab0")
ADDRESS = os.environ.get("DS01_LAB_ADDRESS", "10.201.0.1/24")
TABLES = ("filter", "nat")


def bridge_up() -> None:
    """Make the bridge unless it is there."""
    if not Path("/sys/class/net", BRIDGE).exists():
        run(as_root(["ip", "link", "add", BRIDGE, "type", "bridge"]))
        run(as_root(["ip", "address", "add", ADDRESS, "dev", BRIDGE]))
    run(as_root(["ip", "link", "set", BRIDGE, "up"]))


def bridge_down() -> None:
    """Remove the bridge, and the packet filter rules that dockerd leaves behind for it."""
    if not Path("/sys/class/net", BRIDGE).exists():
        return
    for table in TABLES:
        rules = run(as_root(["iptables", "--table", table, "--list-rules"]))
        for rule in rules_naming(BRIDGE, rules):
            run(as_root(["iptables", "--table", table, "--delete", *rule]))
    run(as_root(["ip", "link", "delete", BRIDGE]))


def rules_naming(bridge: str, listing: str) -> list[list[str]]:
    """The rules of an `iptables --list-rules` that name the bridge or its network, as arguments to delete them."""
    network = str(ipaddress.ip_interface(ADDRESS).network)
    words = [line.split() for line in listing.splitlines() if line.startswith("-A ")]
    return [rule[1:] for rule in words if bridge in rule or network in rule]
