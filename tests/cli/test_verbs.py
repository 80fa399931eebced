import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from cli_runner import Cli
from fake_node import JOB, FakeNode
from rich.console import Console

from swarmnode.cli.show import job_panel
from swarmnode.codings import Coding
from swarmnode.domain import PeerId
from swarmnode.http.api import CoarserLink, Departure

MODEL = '[model]\nconfig = "config.json"\n[data]\npath = "text.txt"\n'


def test_status_and_peers_show_what_the_node_says(cli: Cli, node: FakeNode) -> None:
    status, out, _ = cli("status", "--json")
    assert (status, json.loads(out)["peer"]) == (0, node.node().peer)
    assert node.node().join_address in cli("status")[1]
    peers = json.loads(cli("peers", "--json")[1])
    assert [peer["is_self"] for peer in peers] == [True, False, False]
    assert "12D3KooWA (this node)" in cli("peers")[1]


def test_jobs_lists_every_job(cli: Cli, node: FakeNode) -> None:
    (listed,) = json.loads(cli("jobs", "--json")[1])
    assert (listed["job"], listed["step"], "losses" in listed) == (JOB, 3, False)
    assert f"{JOB}  tiny  training  3/10" in cli("jobs")[1]
    node.jobs_.clear()
    assert "swarmnode submit" in cli("jobs")[1]


def test_submit_sends_the_file_and_where_it_lies(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'name = "mine"\n{MODEL}')
    status, out, err = cli("submit", str(path), "--json")
    assert (status, json.loads(out)["job"] in node.jobs_, err.strip()) == (0, True, "")
    assert cli("submit", str(path))[0::2] == (
        2,
        "swarmnode: the job: name 'mine' is taken\n",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'name = "x"\nbogus = 1\n{MODEL}', "unknown key 'bogus'"),
        (f'name = "x"\n{MODEL}[run]\nsteps = -1\n', "run.steps"),
        ("name = ", "not readable as TOML"),
    ],
)
def test_a_bad_job_file_is_one_line_that_names_it(
    cli: Cli, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    status, out, err = cli("submit", str(path))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err
    assert said in err


def test_watch_prints_lines_until_the_job_serves(cli: Cli, node: FakeNode) -> None:
    node.change(phase="serving", step=10, val_loss=2.125)
    status, out, _ = cli("watch", "tiny")
    assert status == 0
    assert "serving" in out
    assert "step 10/10" in out
    assert "validation 2.1250" in out
    assert "coded" not in out, "nothing yet"
    coding = Coding("activation", "aq/int4/32", 700, 100, 0.5, 0.0, 0.0)
    node.change(codecs={"activation": "aq/int4/32"}, val_codec="bf16", codings=(coding,))
    assert "coded float32 / 7.0" in cli("watch", "tiny")[1]
    (line,) = cli("watch", "tiny", "--json")[1].splitlines()
    view = json.loads(line)
    assert view["bytes_by_kind"] == {"activation": 1000, "reduced": 500}
    assert (view["val_codec"], view["codings"]) == ("bf16", [asdict(coding)])


def test_links_that_run_coarser_are_shown_in_words_and_as_json(cli: Cli, node: FakeNode) -> None:
    node.change(phase="serving", step=10)
    assert "coarser" not in cli("watch", "tiny")[1]
    assert json.loads(cli("watch", "tiny", "--json")[1])["coarser_links"] == []
    link = CoarserLink(PeerId("Qm1234abcdef"), PeerId("Qm5678uvwxyz"), "slow", "int4/32", "int8")
    node.change(coarser_links=(link,))
    assert "1 link coarser" in cli("watch", "tiny")[1]
    view = json.loads(cli("watch", "tiny", "--json")[1])
    assert view["coarser_links"] == [asdict(link)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(job_panel(node.job(JOB)))
    assert "abcdef to uvwxyz: slow, int4/32 and int8" in console.export_text()


def test_watching_a_job_that_failed_fails(cli: Cli, node: FakeNode) -> None:
    node.change(phase="failed", reason="a worker ran out of memory")
    status, out, _ = cli("watch", JOB[:6])
    assert status == 1
    assert "a worker ran out of memory" in out


def test_generate_prints_the_text_and_passes_the_options(cli: Cli, node: FakeNode) -> None:
    assert cli("generate", "tiny", "x")[0] == 2  # it trains
    node.change(phase="serving")
    options = ("--max-tokens", "12", "--temperature", "0.5", "--seed", "7")
    assert cli("generate", "tiny", "Hi", *options)[:2] == (0, "Ahoj světe!\n")
    prompt, max_tokens, sampling = node.prompts[-1]
    assert (bytes(prompt), max_tokens) == (b"Hi", 12)
    assert (sampling.temperature, sampling.seed) == (0.5, 7)
    answer = json.loads(cli("generate", "tiny", "Hi", *options, "--json")[1])
    assert answer == {"job": JOB, "prompt": "Hi", "text": "Ahoj světe!"}


def test_what_a_model_says_cannot_drive_the_terminal(cli: Cli, node: FakeNode) -> None:
    node.change(phase="serving")
    node.model_.script = b"\x1b[31mred\r\x07"
    _, out, _ = cli("generate", "tiny", "x", "--max-tokens", "10")
    assert out == "\\x1b[31mred\\r\\x07\n"


def test_a_broken_route_is_a_failure_and_a_busy_one_can_be_mended(cli: Cli, node: FakeNode) -> None:
    node.change(phase="serving")
    node.fail_after = 2
    status, _, err = cli("generate", "tiny", "x")
    assert (status, err.startswith("swarmnode: failed: peer 12D3KooWC lost")) == (1, True)
    node.num_open = 1
    assert cli("generate", "tiny", "x")[0::2] == (
        2,
        "swarmnode: another conversation is in progress\n",
    )


def test_export_and_stop(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    answer = json.loads(cli("export", "tiny", str(folder), "--json")[1])
    assert answer == {"step": 3, "directory": str(folder)}
    assert (folder / "config.json").exists()
    status, _, err = cli("export", "tiny", str(folder))
    assert (status, err) == (2, f"swarmnode: {folder} is not empty\n")
    assert "stopped after 3 steps" in cli("stop", "tiny")[1]
    assert node.jobs_[JOB].phase == "stopped"


def test_submit_says_what_its_owner_should_know(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'name = "mine"\n{MODEL}')
    node.notes_ = ("run.seed differs \x1b[31m",)
    status, out, err = cli("submit", str(path), "--json")
    assert (status, err) == (0, "swarmnode: note: run.seed differs \\x1b[31m\n")
    assert json.loads(out)["notes"] == list(node.notes_)


@pytest.mark.parametrize("verb", ["watch", "stop"])
@pytest.mark.parametrize("name", ["nothing", "../node", "a b"])
def test_an_unknown_job_says_how_to_find_one(cli: Cli, verb: str, name: str) -> None:
    status, out, err = cli(verb, name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "swarmnode jobs" in err


def test_without_a_node_each_verb_says_how_to_start_one(cli: Cli, home: Path) -> None:
    (home / "http.json").write_text('{"address": "http://127.0.0.1:1", "pid": 1}')
    status, _, err = cli("status")
    assert (status, err.count("\n"), f"swarmnode up --home {home}" in err) == (2, 1, True)
    (home / "http.json").unlink()
    assert cli("status")[0::2] == (2, err)


def test_a_stale_token_is_said(cli: Cli, home: Path) -> None:
    (home / "token").write_text("of an earlier life")
    status, _, err = cli("jobs")
    assert (status, "wrong or stale token" in err) == (2, True)


def test_up_refuses_bad_options_in_one_line(cli: Cli) -> None:
    status, out, err = cli("up", "--memory", "8 apples")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "'8 apples' is no amount of memory; write 8GB or 8GiB" in err


def test_help_and_verbs_import_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['swarmnode', '--help']\n"
        "from swarmnode.cli import main, verbs\n"
        "try: main.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'libp2p', 'hivemind', 'trio', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("up", "submit", "jobs", "watch", "export", "generate", "status", "peers", "demo"):
        assert f"\n  {verb} " in done.stdout


def ended(node: FakeNode, home: Path, **changes: object) -> None:
    """The node's process ends when it is asked to, and leaves this word."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    said = Departure(process.pid, (f"{JOB} 0/0",), (), (), in_time=True)

    def end() -> None:
        (home / "departure.json").write_text(json.dumps(asdict(said) | changes))
        process.communicate()

    node.pid, node.end = process.pid, end


def test_finish_says_how_many_slots_others_have(cli: Cli, node: FakeNode, home: Path) -> None:
    ended(node, home)
    status, out, _ = cli("finish")
    assert (status, out) == (0, "the node has ended; 1 of its 1 slots were handed over\n")
    ended(node, home)
    status, out, _ = cli("finish", "--json")
    assert (status, json.loads(out)) == (
        0,
        {
            "peer": node.node().peer,
            "handed_over": [f"{JOB} 0/0"],
            "kept": [],
            "coordinated": [],
            "in_time": True,
        },
    )


def test_finish_fails_where_the_node_ended_with_slots(cli: Cli, node: FakeNode, home: Path) -> None:
    kept = [f"{JOB} 0/1", f"{JOB} 1/0"]
    ended(node, home, kept=kept, in_time=False)
    status, out, _ = cli("finish")
    assert status == 1
    assert out == (
        "the node has ended; 1 of its 3 slots were handed over, "
        "2 ended with it before others had them\n"
    )
    ended(node, home, handed_over=[], kept=kept, coordinated=[JOB])
    status, out, _ = cli("finish")
    assert (status, f"2 ended with it; it coordinated {JOB} to the end" in out) == (1, True)
    ended(node, home, kept=kept, in_time=False)
    status, out, _ = cli("finish", "--json")
    assert (status, json.loads(out)["kept"], json.loads(out)["in_time"]) == (1, kept, False)


@pytest.mark.parametrize("word", ["none", "an earlier life's"])
def test_finish_fails_where_the_node_left_no_word(
    cli: Cli, node: FakeNode, home: Path, word: str
) -> None:
    ended(node, home, pid=0)
    if word == "none":
        (end, node.end) = (node.end, lambda: None)
        end()
        (home / "departure.json").unlink()
    status, out, err = cli("finish")
    assert (status, out) == (1, "")
    assert err == (
        "swarmnode: failed: the node has ended without a word of what became of its "
        "1 slots; see its log\n"
    )
