"""What the swarm gives back: a folder that everybody's tools load, and an OpenAI endpoint."""

import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers

from swarmnode.cli.local_swarm import LocalSwarm
from tests.dashboard.prometheus_check import check_dashboard, missing_binary
from tests.processes.conftest import job_file, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]
PROMPT = "def main("


@pytest.fixture(scope="module")
def trained(swarm: LocalSwarm, text: Path) -> str:
    client = swarm.node(0).client
    job = client.submit(job_file(text, "trained", run={"steps": 30}), text)
    wait_for(client, job, serving)
    return job


@pytest.fixture(scope="module")
def exported(swarm: LocalSwarm, trained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    assert swarm.node(0).client.export(trained, folder) == 30
    return folder


def endpoint(swarm: LocalSwarm) -> str:
    return swarm.node(0).client.node().http_address + "/v1"


def test_greedy_tokens_equal_those_of_transformers_on_the_export(
    swarm: LocalSwarm, trained: str, exported: Path
) -> None:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=256)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    with openai.OpenAI(base_url=endpoint(swarm), api_key="any") as client:
        answer = client.completions.create(
            model="trained", prompt=PROMPT, max_tokens=40, temperature=0
        )
    assert answer.choices[0].text == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)


def test_logits_of_the_export_equal_the_swarms(
    swarm: LocalSwarm, trained: str, exported: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    with openai.OpenAI(base_url=endpoint(swarm), api_key="any") as client:
        answer = client.completions.create(
            model="trained", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    with torch.no_grad():
        ids = torch.tensor([list(PROMPT.encode())])
        expected = model(ids).logits[0, -1].log_softmax(-1).max()
    assert logprobs.token_logprobs[0] == pytest.approx(float(expected), abs=1e-4)


def test_a_chat_streams_to_a_stock_client(swarm: LocalSwarm, trained: str) -> None:
    with openai.OpenAI(base_url=endpoint(swarm), api_key="any") as client:
        assert "trained" in [model.id for model in client.models.list()]
        stream = client.chat.completions.create(
            model="trained",
            messages=[{"role": "user", "content": "import"}],
            max_tokens=30,
            stream=True,
            temperature=0,
        )
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert len(chunks) > 3


def test_an_imported_folder_is_served_without_training(
    swarm: LocalSwarm, exported: Path, text: Path
) -> None:
    client = swarm.node(0).client
    job = {
        "name": "imported",
        "kind": "serve",
        "model": {"path": str(exported)},
        "placement": {"stages": 3, "slots": 1},
    }
    name = client.submit(job, text)
    try:
        view = wait_for(client, name, serving)
        assert len(view.placement) == 3
        with openai.OpenAI(base_url=endpoint(swarm), api_key="any") as model:
            ask = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
            ours = model.completions.create(model="imported", **ask)
            theirs = model.completions.create(model="trained", **ask)
        assert ours.choices[0].text == theirs.choices[0].text
    finally:
        client.stop(name)


def test_every_daemon_has_metrics_with_units(swarm: LocalSwarm, trained: str) -> None:
    seen = set()
    for node in swarm.nodes:
        text = httpx.get(node.client.node().http_address + "/metrics").text
        assert "swarmnode_peers 4.0" in text
        seen |= {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {"swarmnode_job_step_seconds", "swarmnode_sent_bytes_total"} <= seen


@pytest.mark.skipif(missing_binary() is not None, reason=str(missing_binary()))
def test_a_real_prometheus_answers_every_expression_of_the_dashboard(
    swarm: LocalSwarm, text: Path, targets: Path, tmp_path: Path
) -> None:
    client = swarm.node(0).client
    job = client.submit(job_file(text, "watched", run={"steps": 600}), text)
    try:
        wait_for(client, job, lambda view: view.step >= 5)
        check_dashboard(targets, tmp_path)
    finally:
        client.stop(job)


def test_a_conversation_goes_on_when_a_stage_dies_under_it(swarm: LocalSwarm, text: Path) -> None:
    client = swarm.node(0).client
    job = client.submit(job_file(text, "spoken", run={"steps": 20}), text)
    try:
        view = wait_for(client, job, serving)
        ask = {"model": "spoken", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
        with openai.OpenAI(base_url=endpoint(swarm), api_key="any") as api:
            expected = api.completions.create(**ask).choices[0].text
            got, victim = "", None
            for chunk in api.completions.create(**ask, stream=True):
                got += chunk.choices[0].text
                if victim is None and len(got) > 10:
                    me = client.node().peer
                    peer = next(p for row in view.placement for p in row[:1] if p != me)
                    victim = swarm.index_of(peer)
                    swarm.kill(victim)
                    killed_s = time.monotonic()
        assert got == expected
        assert time.monotonic() - killed_s < 15.0, "it does not wait for a timeout"
    finally:
        client.stop(job)
        if victim is not None:
            swarm.start_node(victim)
            swarm.wait_for_peers(4)
