"""A line between two real hosts that stalls the pipeline gets coarser codecs by itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmnode.http.api import JobView
from tests.chaos.hosts import Hosts, why_not
from tests.chaos.test_links import Far
from tests.processes.conftest import TINY_LLAMA, job_file

pytestmark = [
    pytest.mark.processes, pytest.mark.namespaces, pytest.mark.long, pytest.mark.timeout(300),
]  # fmt: skip
BATCH = {"rows": 16, "sequence_length": 128, "num_microbatches": 8}
WIDTH = 128
SHALLOW = {**TINY_LLAMA, "hidden_size": WIDTH, "intermediate_size": 320, "num_hidden_layers": 2}
"""Little to compute, wide boundaries: eight frames of 266 kB each way in a step."""


@pytest.fixture
def pair(tmp_path: Path, text: Path) -> Iterator[Far]:
    """Two nodes whose lines carry 5 Mbit/s each way."""
    if reason := why_not():
        pytest.skip(reason)
    hosts = Hosts(2)
    try:
        hosts.make()
        swarm = Far(hosts, tmp_path, text, num_nodes=2)
        try:
            swarm.start()
            for index in range(2):
                hosts.slow_down(index, "5mbit")
            yield swarm
        finally:
            swarm.stop()
    finally:
        hosts.remove()


def crossed(view: JobView) -> int:
    """Bytes of hidden states and their gradients that workers have sent each other so far."""
    return view.bytes_by_kind["activation"] + view.bytes_by_kind["activation_gradient"]


def test_a_line_that_stalls_the_pipeline_takes_coarser_codecs_and_carries_less(
    pair: Far, text: Path
) -> None:
    raw = job_file(
        text,
        "slow-line",
        model={"config": SHALLOW},
        batch=BATCH,
        placement={"slots": 1},
        codecs={"preset": "home"},
        run={"steps": 400, "checkpoint_every": 0},
    )
    job = pair.ask(0, lambda client: client.submit(raw, text))
    fine = pair.until(job, lambda view: view.step >= 3)
    assert fine.coarser_links == ()

    def is_coarser(view: JobView) -> bool:
        return len(view.coarser_links) == 2

    began = pair.until(job, is_coarser)
    assert began.generation > fine.generation
    assert began.placement == fine.placement, "everybody stays where they are"
    first = pair.until(job, lambda view: view.step >= began.step + 1)
    coarse = pair.until(job, lambda view: view.step >= first.step + 5)
    assert {codings.codec for codings in coarse.codings if codings.kind == "activation"} == {
        "int8", "int4/32",
    }  # fmt: skip
    values = BATCH["rows"] * BATCH["sequence_length"] * WIDTH
    int8_bytes = 2 * BATCH["num_microbatches"] * values * 8.125 / 8
    per_step = (crossed(coarse) - crossed(first)) / (coarse.step - first.step)
    assert per_step < 0.75 * int8_bytes, "4.5 bits instead of 8.125, give or take a step of five"
    assert (coarse.recoveries, coarse.killed_peers) == (0, ())
    pair.ask(0, lambda client: client.stop(job))
