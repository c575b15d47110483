"""What the lab reads off, and does to, the machine it runs on."""

from pathlib import Path

import pytest
from ds01_lab import apt, engine, mounts, network


def test_the_mirror_is_debians_main_archive_not_security_nor_a_third_party():
    targets = "Debian|Debian-Security|http://s/\nVendor|Debian|http://v/\nDebian|Debian|http://m/debian/\n"
    assert apt.choose_mirror(targets) == "http://m/debian/"
    assert apt.choose_mirror("Ubuntu|Ubuntu|http://u/\n") is None
    assert apt.choose_mirror("||http://never-updated/\n") is None


def test_the_mirror_may_be_set(monkeypatch):
    monkeypatch.setenv(apt.MIRROR_VARIABLE, "http://mine/debian")
    assert apt.mirror() == "http://mine/debian"


def test_the_bridges_rules_name_nothing_but_the_bridge():
    for rule in network.rules("br9", "10.9.0.1/24"):
        assert "br9" in rule
    assert "10.9.0.0/24" in network.rules("br9", "10.9.0.1/24")[0]


@pytest.mark.parametrize("content", ["", "not a number", "1", "999999999"])
def test_a_pid_file_of_somebody_elses_process_is_not_ours(tmp_path, monkeypatch, content):
    monkeypatch.setattr(engine, "PIDFILE", tmp_path / "dockerd.pid")
    engine.PIDFILE.write_text(content)
    assert engine._own_pid() is None


def test_mounts_are_released_deepest_first_and_only_below():
    table = "x /a/b ext4 rw\nx /a/b/c proc rw\nx /a/bc ext4 rw\nx /a ext4 rw\n"
    assert mounts.below(table, Path("/a/b")) == ["/a/b/c"]
    assert mounts.below(table, Path("/a")) == ["/a/bc", "/a/b/c", "/a/b"]
