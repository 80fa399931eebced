"""Write grafana/swarmnode.json: the dashboard of a swarm, generated so that it can be reviewed."""

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
)

OUTPUT = Path(__file__).parent / "grafana" / "swarmnode.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'job_name=~"$job_name"'
NODE = 'peer=~"$peer"'

Query = tuple[str, str]
"""An expression and the legend of its series."""


def number(title: str, text: str, unit: str, expression: str, *, decimals: int = 0) -> stat.Panel:
    """One number with its recent course behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .decimals(decimals)
        .no_value("none")
        .graph_mode(BigValueGraphMode.AREA)
        .height(4)
        .span(4)
        .with_target(prometheus.Dataquery().expr(expression).ref_id("A").datasource(SOURCE))
    )


def curves(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    span: int = 12,
    stacked: bool = False,
    minimum: float | None = 0,
) -> timeseries.Panel:
    """Series over time, with a legend that names their last value."""
    legend = (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull"])
    )
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .legend(legend)
        .tooltip(tooltip)
        .show_points(VisibilityMode.NEVER)
        .line_width(2)
        .fill_opacity(25 if stacked else 8)
        .height(8)
        .span(span)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if minimum is not None:
        panel = panel.min(minimum)
    for index, (expression, legend_text) in enumerate(queries):
        panel = panel.with_target(
            prometheus.Dataquery()
            .expr(expression)
            .legend_format(legend_text)
            .ref_id("ABCDEFGH"[index])
            .datasource(SOURCE)
        )
    return panel


def quantile(share: float) -> str:
    """The step time that `share` of the steps stay below."""
    buckets = f"rate(swarmnode_job_step_seconds_bucket{{{JOB}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, job_name) ({buckets}))"


def overview() -> list[stat.Panel]:
    rate = f"sum(swarmnode_job_tokens_per_second{{{JOB}}})"
    progress = f"min(swarmnode_job_step{{{JOB}}} / (swarmnode_job_steps{{{JOB}}} > 0))"
    recoveries = f"sum(swarmnode_job_recoveries_total{{{JOB}}})"
    took = f"max(swarmnode_job_recovery_seconds{{{JOB}}})"
    return [
        number("Peers", "As the best informed node counts them.", "short", "max(swarmnode_peers)"),
        number("Nodes scraped", "Nodes that answer.", "short", 'sum(up{job="swarmnode"})'),
        number("Tokens per second", "Of all chosen jobs.", "short", rate, decimals=1),
        number("Progress", "Of the job that is furthest behind.", "percentunit", progress),
        number("Recoveries", "Lost workers that were replaced.", "short", recoveries),
        number("Last recovery", "From the loss to the next commit.", "s", took, decimals=1),
    ]


def training() -> list[timeseries.Panel]:
    sent = f"rate(swarmnode_job_sent_bytes_total{{{JOB}}}[$__rate_interval])"
    step_sum = f"rate(swarmnode_job_step_seconds_sum{{{JOB}}}[$__rate_interval])"
    step_count = f"rate(swarmnode_job_step_seconds_count{{{JOB}}}[$__rate_interval])"
    mean = f"sum by (job_name) ({step_sum}) / (sum by (job_name) ({step_count}) > 0)"
    return [
        curves(
            "Loss", "Nats per token: of the last step, and held out.", "short",
            (f"swarmnode_job_loss_nats{{{JOB}}}", "{{job_name}}"),
            (f"swarmnode_job_validation_loss_nats{{{JOB}}}", "{{job_name}} held out"),
            minimum=None,
        ),
        curves(
            "Tokens per second", "Trained in committed steps.", "short",
            (f"swarmnode_job_tokens_per_second{{{JOB}}}", "{{job_name}}"),
        ),
        curves(
            "Bytes by kind", "Sent by all workers of the chosen jobs.", "Bps",
            (f"sum by (kind) ({sent})", "{{kind}}"),
            stacked=True,
        ),
        curves(
            "Step time", "Between two commits, and as the placement predicts it.", "s",
            (f"swarmnode_job_predicted_step_seconds{{{JOB}}}", "{{job_name}} predicted"),
            (mean, "{{job_name}} mean"),
            (quantile(0.5), "{{job_name}} median"),
            (quantile(0.95), "{{job_name}} 95 %"),
        ),
        curves(
            "Generation", "Grows with every change of the placement.", "short",
            (f"swarmnode_job_generation{{{JOB}}}", "{{job_name}}"),
            span=8,
        ),
        curves(
            "Recoveries", "Lost workers that were replaced, in all.", "short",
            (f"swarmnode_job_recoveries_total{{{JOB}}}", "{{job_name}}"),
            span=8,
        ),
        curves(
            "Steps", "Committed, and asked for.", "short",
            (f"swarmnode_job_step{{{JOB}}}", "{{job_name}} committed"),
            (f"swarmnode_job_steps{{{JOB}}}", "{{job_name}} asked for"),
            span=8,
        ),
    ]  # fmt: skip


def codecs() -> list[timeseries.Panel]:
    coded = f"rate(swarmnode_coded_bytes_total{{{NODE}}}[$__rate_interval])"
    error = f"swarmnode_coding_error_ratio{{{NODE}}}"
    return [
        curves(
            "Coded bytes", "Of all coded tensors, also of those that stay on their node.", "Bps",
            (f"sum by (kind, codec) ({coded})", "{{kind}} {{codec}}"),
            stacked=True,
        ),
        curves(
            "Coding error", "Norm of what was lost over norm of the tensor: the worst node.",
            "percentunit",
            (f"max by (kind, codec) ({error})", "{{kind}} {{codec}}"),
        ),
    ]  # fmt: skip


def nodes() -> list[timeseries.Panel]:
    free = f"swarmnode_device_memory_free_bytes{{{NODE}}}"
    total = f"swarmnode_device_memory_bytes{{{NODE}}}"
    return [
        curves(
            "Device use", "Share of the time that the device computes.", "percentunit",
            (f"rate(swarmnode_compute_seconds_total{{{NODE}}}[$__rate_interval])", "{{peer}}"),
        ),
        curves(
            "Device memory in use", "Share of the device's memory.", "percentunit",
            (f"1 - {free} / ({total} > 0)", "{{peer}}"),
        ),
        curves(
            "Bytes sent by node", "What each node puts on the wire.", "Bps",
            (f"sum by (peer) (rate(swarmnode_sent_bytes_total{{{NODE}}}[$__rate_interval]))",
             "{{peer}}"),
            span=8,
        ),
        curves(
            "Dropped", "Bad records, refused peers, stale frames.", "cps",
            (f"sum by (reason) (rate(swarmnode_dropped_total{{{NODE}}}[$__rate_interval]))",
             "{{reason}}"),
            span=8,
        ),
        curves(
            "Memory of the processes", "Resident, all processes of a node.", "bytes",
            (f"sum by (peer) (swarmnode_children_rss_bytes{{{NODE}}})", "{{peer}}"),
            (f"process_resident_memory_bytes{{{NODE}}}", "{{peer}} daemon"),
            span=8,
        ),
        curves(
            "Processor of the daemon", "Cores in use by the daemon itself.", "short",
            (f"rate(process_cpu_seconds_total{{{NODE}}}[$__rate_interval])", "{{peer}}"),
        ),
        curves(
            "Peers by node", "How many peers each node sees, itself included.", "short",
            (f"swarmnode_peers{{{NODE}}}", "{{peer}}"),
        ),
        curves(
            "Links: latency", "One way, as the node at the near end has measured it.", "s",
            (f"swarmnode_link_latency_seconds{{{NODE}}}", "{{peer}} to {{to_peer}}"),
        ),
        curves(
            "Links: bandwidth", "From the node to another one: transfers, else probes.", "Bps",
            (f"swarmnode_link_bytes_per_second{{{NODE}}}", "{{peer}} to {{to_peer}}"),
        ),
    ]  # fmt: skip


def choice(name: str, label: str, query: str) -> dashboards.QueryVariable:
    """A variable that lists the values of a label; all of them unless chosen."""
    return (
        dashboards.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def build() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    builder = (
        dashboards.Dashboard("swarmnode")
        .uid("swarmnode")
        .description("Training and serving on a swarm of home GPUs.")
        .tags(["swarmnode"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            dashboards.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(choice("job_name", "Job", "label_values(swarmnode_job_step, job_name)"))
        .with_variable(choice("peer", "Node", 'label_values(up{job="swarmnode"}, peer)'))
    )
    rows = (
        ("Swarm", overview()), ("Jobs", training()), ("Codecs", codecs()), ("Nodes", nodes()),
    )  # fmt: skip
    for title, panels in rows:
        builder = builder.with_row(dashboards.Row(title))
        for panel in panels:
            builder = builder.with_panel(panel)
    body: dict[str, Any] = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    return body


def expressions(body: dict[str, Any]) -> list[str]:
    """Every PromQL expression of a dashboard, in order."""
    return [t["expr"] for panel in body["panels"] for t in panel.get("targets", [])]


def text() -> str:
    """The dashboard as it is committed."""
    return json.dumps(build(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text(), encoding="utf-8")
