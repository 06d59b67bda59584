"""What Prometheus' rules and Grafana's dashboard ask for, read from their files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
DASHBOARD = GRAFANA / "dashboards/train-export.json"

# These are no server's of ours. Envoy's are looked for on a real one in tests/compose.
ENVOY = frozenset({
    "envoy_cluster_membership_healthy",
    "envoy_cluster_membership_total",
    "envoy_cluster_outlier_detection_ejections_active",
    "envoy_cluster_upstream_rq_active",
    "envoy_cluster_upstream_rq_retry",
    "envoy_cluster_upstream_rq_retry_limit_exceeded",
    "envoy_cluster_upstream_rq_total",
    "envoy_http_downstream_cx_active",
})  # fmt: skip
OF_PROMETHEUS = frozenset({"up", "ALERTS"})

# What is left of a query without these, and without functions, is metrics.
NO_METRICS = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # strings
    r"|\[[^\]]*\]"  # ranges
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"  # labels
    r"|\b(?:and|or|unless|bool|offset)\b"
)
LABELS = re.compile(r"\{[^}]*\}")
METRIC = re.compile(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()")
VARIABLE = re.compile(r"label_values\((.+), *\w+\)")


def metrics(query: str) -> set[str]:
    """Return the names of the metrics that a PromQL query asks for."""
    return set(METRIC.findall(LABELS.sub(" ", NO_METRICS.sub(" ", query))))


def rules() -> list[dict[str, Any]]:
    """Return every rule, recorded ones and alerts."""
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels but its headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[str]:
    """Yield what the dashboard asks, with a value for each of its variables."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "10s").replace("$model", ".*")


def asked() -> set[str]:
    """Return the name of every metric that a rule, a panel or a variable asks for."""
    found = {name for query in dashboard_queries() for name in metrics(query)}
    for rule in rules():
        found |= metrics(rule["expr"])
    for variable in dashboard()["templating"]["list"]:
        parts = VARIABLE.fullmatch(variable["definition"])
        assert parts is not None, variable["definition"]
        found |= metrics(parts[1])
    return found
