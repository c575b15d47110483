"""The alert rules and the dashboard: understood by Prometheus, and about metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import needs_promtool, promtool
from support import ROOT
from test_publishing import every_family

RULES = ROOT / "config" / "prometheus" / "ds01.rules.yml"
TESTS = ROOT / "tests" / "prometheus" / "ds01.rules.test.yml"
DASHBOARD = json.loads((ROOT / "config" / "grafana" / "ds01.json").read_text(encoding="utf-8"))
GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
EVERY_RULE = [rule for group in GROUPS for rule in group["rules"]]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# What Grafana fills in.
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1d", "$instance": ".*", "$user": ".*"}
_METRIC = re.compile(r"\bds01_[a-z0-9_]+")


def queries() -> Iterator[tuple[str, str]]:
    """Panel title and expression, as Prometheus gets it."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in _VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


@needs_promtool
def test_prometheus_understands_the_rules() -> None:
    code, said = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert code == 0, said


@needs_promtool
def test_the_alerts_fire_when_they_should() -> None:
    code, said = promtool("test", "rules", TESTS)
    assert code == 0, said


def test_every_rule_has_a_test() -> None:
    tests = yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
    alerts = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    records = {case["expr"] for test in tests for case in test.get("promql_expr_test", ())}
    assert {rule["alert"] for rule in EVERY_RULE if "alert" in rule} == alerts
    assert {rule["record"] for rule in EVERY_RULE if "record" in rule} == records


@pytest.mark.parametrize("alert", [rule for rule in EVERY_RULE if "alert" in rule], ids=lambda rule: rule["alert"])
def test_an_alert_says_where_what_and_what_next(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"]["summary"].startswith("{{ $labels.instance }}: ")
    assert alert["annotations"]["description"].endswith(".")
    assert alert["alert"] in DOCUMENT


@needs_promtool
def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": expression} for n, (_, expression) in enumerate(queries())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    code, said = promtool("check", "rules", file)
    assert code == 0, said


def test_rules_and_dashboard_are_about_metrics_that_exist() -> None:
    there = {family.name for family in every_family()}
    variables = [variable.get("definition", "") for variable in DASHBOARD["templating"]["list"]]
    used = "\n".join([*(rule["expr"] for rule in EVERY_RULE), *(expression for _, expression in queries()), *variables])
    assert set(_METRIC.findall(used)) <= there


def test_every_metric_is_documented_and_none_that_is_not() -> None:
    there = {family.name for family in every_family()}
    rows = re.findall(r"^\| `(ds01_[a-z0-9_]+)", DOCUMENT, flags=re.MULTILINE)
    assert sorted(rows) == sorted(there)


def test_panels_have_their_own_place() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"], "two panels in one place"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_no_query_is_left_with_a_variable_that_nobody_fills_in() -> None:
    assert [title for title, expression in queries() if re.search(r"\$[a-z_]", expression)] == []
