"""A real swarm trains: it is plain SGD, and a killed worker changes nothing."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from swarmnode.cli.local_swarm import LocalSwarm
from swarmnode.domain import BlobRef
from swarmnode.manifest import Manifest
from swarmnode.p2p.blob_store import blob_path
from swarmnode.tokens import TokenIndex
from swarmnode.worker.models import initialize, read_config
from swarmnode.worker.training.samples import SampleMap, TokenReader
from tests.processes.conftest import job_file, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


def plain_losses(manifest: Manifest, blobs: Path) -> list[float]:
    """The same job as a plain PyTorch loop in one process."""
    torch.set_num_threads(1)
    batch, run, opt = manifest.batch, manifest.run, manifest.optimizer
    model = transformers.AutoModelForCausalLM.from_config(read_config(manifest.model.config))
    initialize(model, run.seed)
    assert manifest.data is not None
    index = TokenIndex.parse(blob_path(blobs, manifest.data.train).read_bytes())

    def path_of(ref: BlobRef) -> Path:
        return blob_path(blobs, ref)

    reader = TokenReader(index, path_of)
    samples = SampleMap(
        run.seed, index.num_tokens, batch.sequence_length, batch.rows, batch.num_microbatches
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": others}],
        betas=(opt.beta1, opt.beta2),
        eps=opt.epsilon,
        weight_decay=0.0,
    )
    losses = []
    for step in range(run.steps):
        total = 0.0
        for microbatch in range(batch.num_microbatches):
            offsets = samples.sample_offsets(step, microbatch)
            tokens = torch.from_numpy(reader.read(offsets, batch.sequence_length))
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            (loss / batch.num_microbatches).backward()
            total += loss.item() / batch.num_microbatches
        torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip_norm or float("inf"))
        for group in adamw.param_groups:
            group["lr"] = opt.learning_rate_at(step, run.steps)
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses


def test_the_swarm_is_plain_sgd(swarm: LocalSwarm, text: Path) -> None:
    first = swarm.node(0)
    exact = {"activation": "none", "activation_gradient": "none", "gradient": "none"}
    spread = {"min_peers": 4}  # a model as small as this would be faster on fewer machines
    job = job_file(text, "plain", codecs=exact, placement=spread, run={"steps": 50})
    name = first.client.submit(job, text)
    view = wait_for(first.client, name, serving)
    placed = {peer for row in view.placement for peer in row}
    assert len(placed) == 4, "each slot on a process of its own"
    losses = first.client.losses(name)
    saved = json.loads((first.home / "jobs" / name / "job.json").read_text())
    manifest = Manifest.model_validate(saved["manifest"])
    expected = plain_losses(manifest, first.home / "blobs")
    assert len(losses) == len(expected) == 50
    difference = np.abs(np.array(losses, dtype=float) - np.array(expected))
    assert difference.max() <= 1e-4, difference
    assert expected[0] - expected[-1] > 1.0, "and it learns"


@pytest.mark.parametrize("seed", [1])
def test_a_run_killed_at_a_random_moment_ends_like_an_undisturbed_one(
    swarm: LocalSwarm, text: Path, seed: int
) -> None:
    client = swarm.node(0).client
    undisturbed = client.submit(job_file(text, "undisturbed", run={"steps": 40}), text)
    expected = wait_for(client, undisturbed, serving)
    client.stop(undisturbed)
    chance = random.Random(seed)
    killed = client.submit(job_file(text, "killed", run={"steps": 40}), text)
    moment = chance.randrange(2, 35)
    view = wait_for(client, killed, lambda v: v.step >= moment)
    me = client.node().peer
    victims = sorted({peer for row in view.placement for peer in row} - {me})
    victim = swarm.index_of(chance.choice(victims))
    swarm.kill(victim)
    view = wait_for(client, killed, serving)
    try:
        assert view.recoveries == 1
        assert view.generation >= 2
        assert view.recovery_s is not None
        assert view.recovery_s <= 15.0
        assert view.loss == pytest.approx(expected.loss, abs=1e-3)
        assert view.val_loss == pytest.approx(expected.val_loss, abs=1e-3)
        assert len(client.losses(killed)) == 40
    finally:
        client.stop(killed)
        swarm.start_node(victim, "--join", client.node().join_address)
        swarm.wait_for_peers(4)


def test_a_stage_without_a_replica_goes_on_from_the_checkpoint(
    swarm: LocalSwarm, text: Path
) -> None:
    client = swarm.node(0).client
    job = job_file(
        text, "rollback", placement={"slots": 1}, run={"steps": 40, "checkpoint_every": 10}
    )
    name = client.submit(job, text)
    view = wait_for(client, name, lambda v: (v.checkpoint_step or 0) >= 10)
    me = client.node().peer
    victim = swarm.index_of(next(row[0] for row in view.placement if row[0] != me))
    swarm.kill(victim)
    view = wait_for(client, name, serving)
    try:
        losses = client.losses(name)
        assert len(losses) == 40
        assert None not in losses
        assert view.step == 40
        assert view.recoveries == 1
    finally:
        client.stop(name)
        swarm.start_node(victim, "--join", client.node().join_address)
        swarm.wait_for_peers(4)
