from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swarmnode.manifest import JobFile, load_job_file
from swarmnode.presets import byte_llama_config

WORDS = {
    str: "text",
    bool: "true or false",
    int: "integer",
    float: "number",
    dict: "table",
    tuple: "list of integers",
}
ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_a_job_file(path: Path) -> None:
    job = load_job_file(path)
    for named in (job.data and job.data.path, job.model.path):
        assert named is None or Path(named).parent == path.parent


def test_there_is_an_example_of_each_kind() -> None:
    assert {load_job_file(path).kind for path in EXAMPLES} == {"train", "serve"}


def test_the_reference_names_every_key_with_its_default_and_meaning() -> None:
    text = (ROOT / "docs" / "job-files.md").read_text(encoding="utf-8")
    table = "\n".join(["| key | values | default | meaning |", "|---|---|---|---|", *rows(JobFile)])
    assert text.rstrip().endswith(table), f"docs/job-files.md should end with:\n{table}"


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A line of the reference for each key: keys of the file first, then section by section."""
    sections = []
    for name, field in section.model_fields.items():
        inner = [kind for kind in kinds(field.annotation) if isinstance(kind, type)]
        tables = [kind for kind in inner if issubclass(kind, BaseModel)]
        if tables:
            sections.append((tables[0], f"{prefix}{name}."))
            continue
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        yield f"| `{prefix}{name}` | {values(field)} | {default} | {field.description} |"
    for kind, inner_prefix in sections:
        yield from rows(kind, inner_prefix)


def kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


def shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else "none" if value is None else str(value)


def values(field: FieldInfo) -> str:
    """What a key may be: the choices of a literal, or a type and its bounds."""
    names = []
    for kind in kinds(field.annotation):
        if get_origin(kind) is Literal:
            names += [f'`"{choice}"`' for choice in get_args(kind)]
        elif kind is not type(None):
            name = get_origin(kind) or kind
            names.append(WORDS[name])
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(each, key):g}" if getattr(each, key) < 1e6 else ""
        for each in field.metadata
        for key, sign in signs.items()
        if hasattr(each, key)
    ]
    return ", ".join([", ".join(names), *filter(None, bounds)])


def test_the_byte_example_is_the_model_of_the_demo() -> None:
    config = load_job_file(ROOT / "examples" / "bytes.toml").model.config
    assert isinstance(config, dict)
    assert config.items() <= byte_llama_config().items()
