"""The inventory that Ansible gets."""

import yaml
from ds01_lab import inventory, keys
from ds01_lab.inventory import Endpoint

HOSTS = [Endpoint("lab-2", 22201, "ssh-ed25519 BBBB"), Endpoint("lab-1", 22200, "ssh-ed25519 AAAA")]


def test_hosts_are_gpu_servers_with_pinned_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "BUILD", tmp_path / "build")
    path = inventory.write(tmp_path / "inventory", "lab", HOSTS)
    group = yaml.safe_load(path.read_text())["gpu_servers"]
    assert group["hosts"] == {"lab-1": {"ansible_port": 22200}, "lab-2": {"ansible_port": 22201}}
    assert group["vars"]["ansible_host"] == "127.0.0.1"
    assert "StrictHostKeyChecking=yes" in group["vars"]["ansible_ssh_common_args"]
    pinned = keys.known_hosts("lab")
    assert str(pinned) in group["vars"]["ansible_ssh_common_args"]
    assert "[127.0.0.1]:22200 ssh-ed25519 AAAA\n" in pinned.read_text()


def test_without_hosts_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "BUILD", tmp_path / "build")
    path = inventory.write(tmp_path / "inventory", "lab", HOSTS)
    inventory.write(tmp_path / "inventory", "lab", [])
    inventory.write(tmp_path / "inventory", "lab", [])
    assert not path.exists()
    assert not keys.known_hosts("lab").exists()
