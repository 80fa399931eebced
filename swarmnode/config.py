"""How one node is set up: command line over environment over `config.toml` in its home."""

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from swarmnode.errors import UserError

CONFIG_FILE = "config.toml"
DEPARTURE_FILE = "departure.json"
"""What became of a node's work when it was asked to end, in its home."""
HTTP_FILE = "http.json"
"""Where a running node's HTTP server is: {"address": ..., "pid": ...}; gone when it stops."""
TOKEN_FILE = "token"  # noqa: S105 - a file name
LOG_FILE = "daemon.log"
_PREFIX = "SWARMNODE_"
_INNER_VARIABLES = frozenset(
    f"SWARMNODE_{name}" for name in ("PIPE_FD", "PARENT_PID", "FAILPOINT", "FAILPOINT_ONCE")
)
_AMOUNT = re.compile(
    r"(?P<number>\d{1,15}(\.\d{1,15})?)\s*(?P<prefix>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE
)
_PREFIXES = ("", "k", "m", "g", "t")
Port = Annotated[int, Field(ge=0, lt=1 << 16)]


class NodeConfig(BaseSettings):
    """One node. Keys of `config.toml` are the field names; variables are SWARMNODE_<NAME>."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=_PREFIX, use_attribute_docstrings=True
    )

    home: Path
    """Folder that holds everything the node writes."""
    join: Annotated[tuple[str, ...], NoDecode] = ()
    """Addresses of nodes to join; the first node of a swarm has none."""
    listen_host: str = "0.0.0.0"  # noqa: S104 - a volunteer's node is there to be reached
    """IP address to listen on for other nodes; 0.0.0.0 for all."""
    announce_host: str | None = None
    """IP address or name that others reach this node by, where it is not the one listened on."""
    transport_port: Port = 0
    """TCP port for tensors; 0 takes a free one."""
    directory_port: Port = 0
    """TCP port for the directory; 0 takes a free one."""
    http_port: Port = 0
    """Port of the HTTP server on 127.0.0.1; 0 takes a free one."""
    memory_bytes: int | None = Field(default=None, gt=0)
    """Most device memory for jobs, as 8GB or 8GiB; 80 % of what the device has unless given."""
    num_threads: int | None = Field(default=None, ge=1, le=4096)
    """Most CPU threads for each job; all cores unless given."""
    upload_mbit: float | None = Field(default=None, ge=0.5, le=1e6, allow_inf_nan=False)
    """Most Mbit/s for the files of jobs (states, checkpoints, data) that others fetch from this
    node, all together; no limit unless given. What a step exchanges is not among them."""
    targets_directory: Path | None = None
    """Folder where the node announces itself to Prometheus, in a file of its own."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is written to the log."""
    lease_s: float = Field(default=30.0, ge=3, le=600, allow_inf_nan=False)
    """Seconds an advert stays valid; renewed every third of it, so two may get lost."""
    drain_s: float = Field(default=60.0, ge=0, le=3600, allow_inf_nan=False)
    """Most seconds that a node which is asked to stop takes to give its slots to others."""
    child_hang_s: float = Field(default=100.0, ge=2, le=3600, allow_inf_nan=False)
    """Seconds without a sign of life after which the process that computes for a job is replaced.
    One microbatch through one stage must take less; after 120 its coordinator gives the step up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where jobs compute: cuda, cpu, or cuda where there is one."""
    trace: bool = False
    """Write where time goes to files in the folder trace of the home; they grow without end."""

    @property
    def upload_bytes_per_s(self) -> float | None:
        return None if self.upload_mbit is None else self.upload_mbit * 1e6 / 8

    @field_validator("memory_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            factor = 1024 if match["binary"] else 1000
            return int(float(match["number"]) * factor ** _PREFIXES.index(match["prefix"].lower()))
        if isinstance(value, str):
            raise ValueError(f"{value!r:.40} is no amount of memory; write 8GB or 8GiB")
        return value

    @field_validator("join", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("join")
    @classmethod
    def _is_address(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if not re.fullmatch(r"/\S+/p2p/\w+", address):
                raise ValueError(
                    f"{address!r:.200} is no address of a node; give the line that "
                    "`swarmnode up` printed there: /ip4/.../tcp/.../p2p/..."
                )
        return value

    @field_validator("listen_host")
    @classmethod
    def _is_ip_address(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            raise ValueError(f"{value!r:.80} is no IP address; 0.0.0.0 means all") from None

    @field_validator("home", "targets_directory")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()


def default_home() -> Path:
    """The home that is used unless one is named: SWARMNODE_HOME, or the user's data folder."""
    named = os.environ.get(f"{_PREFIX}HOME")
    return Path(named) if named else Path(platformdirs.user_data_dir("swarmnode"))


def load_config(home: Path | None = None, **given: Any) -> NodeConfig:
    """The config of the node in `home`; `given` wins over environment and file, None is not given.

    Raises: UserError with one line that names the source, the key and what is wrong with it.
    """
    home = (home or default_home()).expanduser().absolute()
    path = home / CONFIG_FILE
    options = {name: value for name, value in given.items() if value is not None}
    variables = _variables()
    stored = _read(path)
    settings = {name: value for name, value in stored.items() if name not in variables} | options
    try:
        return NodeConfig(**{**settings, "home": home})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = str(path) if name in stored else "options"
        if name in variables and name not in options:
            source = f"environment variable {variables[name]}"
        if first["type"] == "extra_forbidden":
            what = f"unknown key {name!r}; known: {', '.join(sorted(NodeConfig.model_fields))}"
        elif first["type"] == "value_error":
            what = f"{name}: {first['msg'].removeprefix('Value error, ')}"
        else:
            what = f"{name}: {first['msg']} (got {first['input']!r:.60})"
        raise UserError(f"{source}: {what}") from None


def _variables() -> dict[str, str]:
    """The environment's variable for each field it sets. Raises: UserError for one of no field."""
    found = {}
    for variable in sorted(os.environ):
        name = variable.upper()
        if name.startswith(_PREFIX) and name not in _INNER_VARIABLES:
            field = name.removeprefix(_PREFIX).lower()
            if field not in NodeConfig.model_fields:
                known = ", ".join(f"{_PREFIX}{each.upper()}" for each in NodeConfig.model_fields)
                raise UserError(f"unknown environment variable {variable}; known: {known}")
            found[field] = variable
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise UserError(f"{path.parent} is a file; a home is a folder") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from None
    if "home" in stored:
        raise UserError(f"{path}: home is the folder that this file is in; remove the key")
    return stored
