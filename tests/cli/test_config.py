import json
from pathlib import Path

import pytest

from swarmnode.config import NodeConfig, load_config
from swarmnode.errors import UserError

PEER = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWA"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NodeConfig.model_fields:
        monkeypatch.delenv(f"SWARMNODE_{name.upper()}", raising=False)


def test_options_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text(
        'http_port = 1\ntransport_port = 1\ndirectory_port = 1\nmemory_bytes = "2GiB"\n'
    )
    monkeypatch.setenv("SWARMNODE_TRANSPORT_PORT", "2")
    monkeypatch.setenv("SWARMNODE_DIRECTORY_PORT", "2")
    config = load_config(tmp_path, directory_port=3, lease_s=None)
    ports = (config.http_port, config.transport_port, config.directory_port)
    assert (ports, config.memory_bytes, config.lease_s) == ((1, 2, 3), 2 << 30, 30.0)


def test_the_home_comes_from_the_environment_unless_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMNODE_HOME", str(tmp_path / "a"))
    assert load_config().home == tmp_path / "a"
    assert load_config(tmp_path / "b").home == tmp_path / "b"


def test_addresses_to_join_are_a_list_or_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text(f"join = {json.dumps([PEER])}")
    assert load_config(tmp_path).join == (PEER,)
    monkeypatch.setenv("SWARMNODE_JOIN", f"{PEER}, {PEER}x")
    assert load_config(tmp_path).join == (PEER, f"{PEER}x")
    monkeypatch.setenv("SWARMNODE_JOIN", "")
    assert load_config(tmp_path).join == ()


@pytest.mark.parametrize(
    ("amount", "num_bytes"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 << 29), ("512m", 512 * 10**6), ("7", 7), (9, 9)],
)
def test_memory_is_given_with_a_unit(tmp_path: Path, amount: str | int, num_bytes: int) -> None:
    assert load_config(tmp_path, memory_bytes=amount).memory_bytes == num_bytes


def test_an_upload_is_limited_in_megabits_or_not_at_all(tmp_path: Path) -> None:
    assert load_config(tmp_path).upload_bytes_per_s is None
    assert load_config(tmp_path, upload_mbit=20).upload_bytes_per_s == 2.5e6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("htp_port = 1", "config.toml: unknown key 'htp_port'"),
        ("http_port = 70000", "config.toml: http_port: "),
        ('device = "tpu"', "config.toml: device: "),
        ("memory_bytes = 0", "config.toml: memory_bytes: "),
        ("upload_mbit = 0", "config.toml: upload_mbit: "),
        ('join = ["192.0.2.1:4001"]', "config.toml: join: '192.0.2.1:4001' is no address"),
        ('listen_host = "everywhere"', "config.toml: listen_host: 'everywhere' is no IP address"),
        ("lease_s = nan", "config.toml: lease_s: "),
        ('home = "/elsewhere"', "config.toml: home is the folder"),
        ("http_port = ", "config.toml: not readable as TOML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_variable_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMNODE_LEASE_S", "long")
    with pytest.raises(UserError, match="environment variable SWARMNODE_LEASE_S: lease_s: "):
        load_config(tmp_path)
    assert load_config(tmp_path, lease_s=9).lease_s == 9
    monkeypatch.setenv("SWARMNODE_LEESE_S", "9")
    with pytest.raises(UserError, match="unknown environment variable SWARMNODE_LEESE_S; known: "):
        load_config(tmp_path)


def test_every_field_says_what_it_is_and_the_config_is_frozen(tmp_path: Path) -> None:
    assert all(field.description for field in NodeConfig.model_fields.values())
    config = load_config(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.http_port = 1  # type: ignore[misc]
