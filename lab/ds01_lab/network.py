"""The private engine's network: a bridge and packet filter rules of its own.

Two engines on one machine must not share docker0, and each that manages iptables clears what the other wrote there.
So the private one leaves iptables alone (its proxy process serves published ports), and these few rules let its hosts
out.
"""

import ipaddress
import os
from pathlib import Path

from .errors import LabError
from .shell import as_root, run

BRIDGE = os.environ.get("DS01_LAB_BRIDGE", "ds01-lab0")
ADDRESS = os.environ.get("DS01_LAB_ADDRESS", "10.201.0.1/24")


def up() -> None:
    """Make the bridge and its rules where they are missing."""
    if not _exists():
        run(as_root(["ip", "link", "add", BRIDGE, "type", "bridge"]))
        run(as_root(["ip", "address", "add", ADDRESS, "dev", BRIDGE]))
    run(as_root(["ip", "link", "set", BRIDGE, "up"]))
    for rule in rules(BRIDGE, ADDRESS):
        if not _has(rule):
            _iptables("--insert", rule)


def down() -> None:
    """Remove the bridge and its rules."""
    if not _exists():
        return
    for rule in rules(BRIDGE, ADDRESS):
        if _has(rule):
            _iptables("--delete", rule)
    run(as_root(["ip", "link", "delete", BRIDGE]))


def rules(bridge: str, address: str) -> list[tuple[str, ...]]:
    """Each rule as table, chain and match: out to the world under the machine's address, and answers back in."""
    network = str(ipaddress.ip_interface(address).network)
    return [
        ("nat", "POSTROUTING", "--source", network, "!", "--out-interface", bridge, "--jump", "MASQUERADE"),
        ("filter", "FORWARD", "--in-interface", bridge, "--jump", "ACCEPT"),
        ("filter", "FORWARD", "--out-interface", bridge, "--jump", "ACCEPT"),
    ]


def _iptables(action: str, rule: tuple[str, ...]) -> None:
    table, chain, *match = rule
    run(as_root(["iptables", "--wait", "--table", table, action, chain, *match]))


def _has(rule: tuple[str, ...]) -> bool:
    try:
        _iptables("--check", rule)
    except LabError:
        return False
    return True


def _exists() -> bool:
    return Path("/sys/class/net", BRIDGE).exists()
