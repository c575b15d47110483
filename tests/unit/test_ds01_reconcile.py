"""ds01_reconcile as Ansible runs it: what it says, and its diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ds01_reconcile
import pytest
from ansible.module_utils.testing import patch_module_args
from ds01.drift import Action
from ds01.reconcile import Reconciled

MENDED = Action("cdi.mended", "p._.alice", "The CDI device of p._.alice was not what the ledger says.", "alice")
FREE = Action("gpu.released", "q._.bob", "0:1 is free again: its hold is over.", "bob")
SEEN = Action("unmanaged.seen", "0", "Device 0 is used without DS01 by process 7.")
PROBLEM = {"stage": "slices", "reason": "engine_unavailable", "msg": "Docker does not answer."}

BOTH = f"cdi.mended p._.alice: {MENDED.message}\ngpu.released q._.bob: {FREE.message}\n"
# name: what reconcile finds, what would be new in the diff (None: there is none)
DIFFS = {
    "done": (Reconciled((MENDED, SEEN, FREE)), BOTH),
    "nothing to do": (Reconciled(), None),
    "only told": (Reconciled((SEEN,)), None),
    "done, but not all": (Reconciled((MENDED, FREE), (PROBLEM,)), BOTH),
}


@pytest.mark.parametrize("check", [True, False], ids=["check", "run"])
@pytest.mark.parametrize(("found", "lines"), DIFFS.values(), ids=DIFFS)
def test_a_diff_has_a_line_for_each_thing_that_is_done(
    found: Reconciled,
    lines: str | None,
    check: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb, other = ("foresee", "reconcile") if check else ("reconcile", "foresee")
    monkeypatch.setattr(ds01_reconcile.reconcile, verb, lambda _ds01: found)
    monkeypatch.delattr(ds01_reconcile.reconcile, other)
    result = run(tmp_path, capsys, _ansible_check_mode=check, _ansible_diff=True)
    assert result.get("diff", {}).get("after") == lines
    assert result.get("diff", {}).get("before") == ("" if lines else None)
    assert result["changed"] is bool(lines)
    assert "diff" not in run(tmp_path, capsys, _ansible_check_mode=check)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], **words: Any) -> dict[str, Any]:
    with patch_module_args({**words, "_ansible_remote_tmp": str(tmp_path)}), pytest.raises(SystemExit):
        ds01_reconcile.main()
    return json.loads(capsys.readouterr().out)
