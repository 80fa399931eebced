"""`swarmnode bench`: measures parts of swarmnode on this machine."""

import json
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from swarmnode.cli.offline import AsJson

if TYPE_CHECKING:
    from swarmnode.compression.measure import Report

bench_app = typer.Typer(
    help="Measure parts of swarmnode on this machine.", no_args_is_help=True, rich_markup_mode=None
)


class ValueType(StrEnum):
    """Of the tensors that are coded."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@bench_app.callback()
def _bench() -> None:
    """Keeps `codec` a verb of its own while it is the only one."""


@bench_app.command("codec")
def bench_codec(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPEC]...", help="Codecs, see docs/compression.md; else a choice."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the tensors are: cpu, cuda.")] = "cpu",
    dtype: Annotated[ValueType, typer.Option(help="Of the values.")] = ValueType.FLOAT32,
    rows: Annotated[int, typer.Option(min=1, help="Rows of 4096 values.")] = 1024,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Measure what codecs send, how fast they are here, and what they lose."""
    from swarmnode.compression.measure import DEFAULT_SPECS, measure

    report = measure(
        specs or DEFAULT_SPECS, device=device, dtype=dtype.value, num_rows=rows, num_runs=runs
    )
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _show(report)


def _show(report: "Report") -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    shape = " x ".join(str(size) for size in report.shape)
    console.print(
        f"{shape} {report.dtype} on {report.device}, {report.num_threads} threads, median of "
        f"{report.num_runs}; a copy: {report.copy.median / 1e6:,.0f} M values/s"
    )
    names = list(report.codecs[0].squared_error) if report.codecs else []
    caption = (
        f"{', '.join(names)}: squared error over squared norm, of float32 values so distributed"
    )
    table = Table(
        "codec", "bits", "encode M/s", "of copy", "decode M/s", "of copy", *names, caption=caption
    )
    for each in report.codecs:
        table.add_row(
            each.spec,
            f"{each.wire_bits:.4g}",
            f"{each.encode.median / 1e6:,.0f}",
            f"{100 * each.encode_share:.0f} %",
            f"{each.decode.median / 1e6:,.0f}",
            f"{100 * each.decode_share:.0f} %",
            *(f"{each.squared_error[name]:.2g}" for name in names),
        )
    console.print(table)
