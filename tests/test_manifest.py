"""Job files and manifests: closed, checked, and one id for one content."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmnode.domain import BlobRef, PeerId
from swarmnode.errors import ManifestError
from swarmnode.manifest import (
    CodecConfig,
    DataContent,
    JobFile,
    Manifest,
    ModelContent,
    OptimizerConfig,
    RunConfig,
    check,
    load_job_file,
    parse_job,
)

BLOB = BlobRef("0" * 64, 1)
TRAIN: dict[str, Any] = {
    "name": "job",
    "model": {"config": "config.json"},
    "data": {"path": "text"},
}


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "job",
        "model": ModelContent(config={"model_type": "llama"}),
        "data": DataContent(train=BLOB, validation=BLOB),
        "tokenizer": BLOB,
        "submitter": PeerId("a"),
        "submitted_at_s": 1.5,
    }
    return Manifest(**{**fields, **changes})


def merged(section: str, **values: Any) -> dict[str, Any]:
    return {**TRAIN, section: {**TRAIN.get(section, {}), **values}}


# ---- the id of a manifest ----------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(config=st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_manifest_that_travelled_is_the_same_byte_for_byte(config: dict[str, Any]) -> None:
    sent = manifest(model=ModelContent(config=config))
    arrived = check(Manifest, json.loads(sent.canonical()), "manifest")
    assert arrived.canonical() == sent.canonical()
    assert arrived == sent
    assert arrived.job == sent.job


def test_a_key_that_says_nothing_does_not_change_the_id() -> None:
    assert b"ahead" not in manifest().canonical()
    assert b'"ahead":2' in manifest(run=RunConfig(ahead=2)).canonical()


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    config = {"b": 1, "a": {"d": 2, "c": 3}}
    turned = {"a": {"c": 3, "d": 2}, "b": 1}
    one, other = (manifest(model=ModelContent(config=c)) for c in (config, turned))
    assert one.job == other.job
    assert len(one.job) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"submitted_at_s": 1.75},
        {"submitter": PeerId("b")},
        {"optimizer": OptimizerConfig(learning_rate=0.1)},
        {"model": ModelContent(config={"model_type": "gpt2"})},
        {"tokenizer": BlobRef("1" * 64, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_content_has_another_id(change: dict[str, Any]) -> None:
    assert manifest(**change).job != manifest().job


# ---- how slots stay together -------------------------------------------------------------------


def test_a_sync_has_one_text_and_without_one_a_manifest_is_what_it_was() -> None:
    said = manifest(codecs=CodecConfig(sync="sparseloco,every=15")).codecs
    again = manifest(codecs=CodecConfig(sync=said.sync)).codecs
    assert said == again
    assert said.num_local_steps == 15
    assert (said.share, said.gathers) == ("topk64of4096/int2+ef", True)
    assert "sync" not in manifest().codecs.model_dump(mode="json")
    assert (manifest().codecs.num_local_steps, manifest().codecs.share) == (1, "none")
    assert check(Manifest, json.loads(manifest(codecs=said).canonical()), "x").codecs == said


def test_a_preset_beside_a_sync_names_the_codecs_of_the_boundaries() -> None:
    job = check(JobFile, merged("codecs", preset="slow", sync="diloco"), "job.toml")
    assert (job.codecs.activation, job.codecs.gradient) == ("int4/32", "none")
    assert job.codecs.by_role.keys() == {"activation", "activation_gradient", "sync"}


def test_a_step_of_local_steps_counts_the_microbatches_of_all() -> None:
    job = manifest(codecs=CodecConfig(sync="diloco,every=7"))
    assert job.microbatches_per_step == 7 * job.batch.num_microbatches
    assert (job.update_clip_norm, manifest().update_clip_norm) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("codecs", "says"),
    [
        ({"sync": "zip"}, "unknown sync 'zip'"),
        ({"sync": "diloco,every=0"}, "every is 1"),
        ({"sync": "allreduce"}, "use codecs.gradient"),
        ({"sync": "qadam"}, "use codecs.gradient"),
        ({"sync": "decentralised"}, "it sends weights"),
        ({"sync": "cocktail"}, "staleness = 1"),
        ({"sync": "streaming"}, "staleness = 1"),
        ({"sync": "co2"}, "staleness = 1"),
        ({"sync": "diloco,fragments=3"}, "fragments are in no training step yet"),
        ({"sync": "diloco,codec=int8,memory=weights"}, "memory = weights"),
        ({"sync": "diloco,reply=int8"}, "the reply has the codec"),
        ({"sync": "diloco,outer=momentum1/0.2/clip1"}, "leave /clip out"),
        ({"sync": "diloco", "gradient": "int8"}, "leave gradient out"),
        ({"sync": "diloco", "activation": "aq/int4/32"}, "take aq/ out"),
        ({"sync": "diloco,every=2000"}, "is over 4096"),
    ],
    ids=repr,
)
def test_a_sync_that_training_cannot_run_is_refused_in_one_line(
    codecs: dict[str, Any], says: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        check(JobFile, merged("codecs", **codecs), "job.toml")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r".*"):
        manifest(codecs=CodecConfig(**codecs))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({**TRAIN, "nmae": "x"}, "unknown key 'nmae'"),
        (merged("batch", row=1), "unknown key 'batch.row'"),
        (merged("run", steps=-1), "run.steps"),
        (merged("run", steps="many"), "(got 'many')"),
        (merged("run", seed=1 << 63), "run.seed"),
        (merged("optimizer", learning_rate=0), "optimizer.learning_rate"),
        (merged("optimizer", learning_rate=float("nan")), "optimizer.learning_rate"),
        (merged("optimizer", epsilon=float("inf")), "optimizer.epsilon"),
        (merged("codecs", gradient="zip"), "codecs.gradient"),
        (
            merged("model", path="weights"),
            "exactly one of model.config, model.path and",
        ),
        ({**TRAIN, "model": {}}, "exactly one of model.config, model.path and"),
        ({"name": "job", "model": {"config": "c"}}, "needs a [data] section"),
        ({**TRAIN, "kind": "serve"}, "needs model.path"),
        ({**TRAIN, "kind": "tune"}, "kind"),
        ({**TRAIN, "name": ""}, "name"),
        ({**TRAIN, "name": "../up"}, "name"),
        ({**TRAIN, "name": "a/b"}, "name"),
        ({**TRAIN, "name": "x" * 65}, "name"),
        ({key: value for key, value in TRAIN.items() if key != "name"}, "name: Field required"),
        ([], ""),
        (None, ""),
    ],
    ids=repr,
)
def test_a_wrong_job_is_refused_in_one_line_that_names_the_key(raw: Any, says: str) -> None:
    with pytest.raises(ManifestError) as caught:
        check(JobFile, raw, "job.toml")
    line = str(caught.value)
    assert line.startswith("job.toml: ")
    assert says in line
    assert len(line.splitlines()) == 1


def test_microbatches_must_be_shared_evenly_among_slots() -> None:
    raw = {**merged("batch", num_microbatches=4), "placement": {"slots": 3}}
    with pytest.raises(ManifestError, match=r"num_microbatches = 4 .* placement\.slots = 3"):
        check(JobFile, raw, "job.toml")
    assert check(JobFile, {**raw, "placement": {"slots": 2}}, "job.toml").placement.slots == 2


@settings(max_examples=100, deadline=None)
@given(raw=json_values, key=st.sampled_from(["name", "model", "data", "batch", "run", "tokenizer"]))
def test_anything_else_is_a_job_or_refused(raw: Any, key: str) -> None:
    for candidate in (raw, {**TRAIN, key: raw}):
        try:
            job = check(JobFile, candidate, "job")
        except ManifestError:
            continue
        assert check(JobFile, job.model_dump(), "job") == job


def test_a_manifest_is_frozen_and_closed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        manifest().name = "other"
    raw = {**json.loads(manifest().canonical()), "run_this": "code"}
    with pytest.raises(ManifestError, match="unknown key 'run_this'"):
        check(Manifest, raw, "manifest")


# ---- files -------------------------------------------------------------------------------------


def test_paths_in_a_job_file_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "jobs" / "job.toml"
    path.parent.mkdir()
    path.write_text(
        'name = "job"\ntokenizer = "../tokens"\n'
        '[model]\nconfig = "config.json"\n[data]\npath = "text"\n'
    )
    job = load_job_file(path)
    assert job.model.config == str(path.parent / "config.json")
    assert job.data is not None
    assert job.data.path == str(path.parent / "text")
    assert job.tokenizer == str(tmp_path / "tokens")


def test_absolute_paths_tables_and_the_word_bytes_stay(tmp_path: Path) -> None:
    raw = {**TRAIN, "model": {"config": {"a": 1}}, "data": {"path": str(tmp_path / "elsewhere")}}
    job = parse_job(raw, base=tmp_path / "here", source="job")
    assert job.model.config == {"a": 1}
    assert job.data is not None
    assert job.data.path == str(tmp_path / "elsewhere")
    assert job.tokenizer == "bytes"


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-that-name/text"])
def test_what_is_no_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match="is no path"):
        parse_job({**TRAIN, "data": {"path": path}}, base=tmp_path, source="job")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"job\.toml: not readable as TOML"):
        load_job_file(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        load_job_file(tmp_path / "none.toml")
    with pytest.raises(ManifestError, match="not readable"):
        load_job_file(tmp_path)


# ---- what follows from a job -------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    num_steps=st.integers(1, 100),
    step=st.integers(0, 99),
)
def test_the_learning_rate_rises_then_stays_between_peak_and_its_final_share(
    schedule: Any, warmup: int, num_steps: int, step: int
) -> None:
    optimizer = OptimizerConfig(warmup_steps=warmup, schedule=schedule, final_fraction=0.1)
    peak, rate = optimizer.learning_rate, optimizer.learning_rate_at(step, num_steps)
    if step < warmup:
        assert rate == pytest.approx(peak * (step + 1) / warmup)
    else:
        assert 0.0999 * peak <= rate <= peak
        assert rate >= optimizer.learning_rate_at(step + 1, num_steps)
    if schedule == "constant" and step >= warmup:
        assert rate == peak


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_begins_at_the_peak_and_ends_at_its_final_share(schedule: Any) -> None:
    optimizer = OptimizerConfig(warmup_steps=10, schedule=schedule, final_fraction=0.25)
    assert optimizer.learning_rate_at(9, 100) == optimizer.learning_rate
    assert optimizer.learning_rate_at(10, 100) == optimizer.learning_rate
    assert optimizer.learning_rate_at(100, 100) == pytest.approx(optimizer.learning_rate / 4)


def test_a_job_that_serves_has_no_steps_and_one_peer_per_stage_is_enough() -> None:
    raw = {"name": "job", "kind": "serve", "model": {"path": "w"}, "placement": {"stages": 3}}
    job = check(JobFile, raw, "job")
    assert (job.num_steps, job.placement.stages) == (0, 3)
    raw["placement"] = {"stages": 3, "min_peers": 1}
    assert check(JobFile, raw, "job").placement.min_peers == 1
    assert manifest().num_steps == manifest().run.steps > 0


def test_a_config_nested_too_deeply_is_refused() -> None:
    config: dict[str, Any] = {}
    for _ in range(300):
        config = {"a": config}
    raw = {**json.loads(manifest().canonical()), "model": {"config": config}}
    try:
        arrived = check(Manifest, raw, "manifest")
    except ManifestError:
        return
    assert len(arrived.job) == 16


# ---- the same bits again -----------------------------------------------------------------------


@pytest.mark.parametrize("placement", [{}, {"stages": 2, "slots": 2}, {"layers": (2, 2)}])
def test_a_deterministic_job_says_where_it_is_cut(
    tmp_path: Path, placement: dict[str, Any]
) -> None:
    raw = {**TRAIN, "run": {"deterministic": True}, "placement": placement}
    with pytest.raises(ManifestError, match=r"needs placement\.slots and placement\.layers"):
        parse_job(raw, base=tmp_path, source="job")
    raw["placement"] = {"slots": 2, "layers": (2, 2)}
    assert parse_job(raw, base=tmp_path, source="job").run.deterministic
    raw = {**raw, "placement": placement, "run": {"deterministic": False}}
    assert not parse_job(raw, base=tmp_path, source="job").run.deterministic
