"""The byte-level tokenizer, and the light reader of tokenizer folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.errors import DataError
from swarmnode.tokenizer import (
    BYTE_VOCAB_SIZE,
    END_OF_TEXT,
    TextTokenizer,
    load_tokenizer,
    write_byte_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bytes"
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer(folder)


@given(st.text(max_size=40) | st.just(f"a{END_OF_TEXT} b"))
def test_the_ids_are_the_bytes_of_the_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_end_token_is_read_only_where_it_is_asked_for(tokenizer: TextTokenizer) -> None:
    assert tokenizer.num_tokens == BYTE_VOCAB_SIZE
    assert tokenizer.end_ids == (256,)
    assert tokenizer.start_id == 256
    assert tokenizer.encode(f"a{END_OF_TEXT}", with_special=True) == [97, 256]
    assert tokenizer.encode(f"a{END_OF_TEXT}") == list(f"a{END_OF_TEXT}".encode())
    assert tokenizer.decode([97, 256]) == "a"
    assert tokenizer.decode([97, 256], skip_special=False) == f"a{END_OF_TEXT}"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_chat_templates_and_end_ids_are_read_from_where_folders_keep_them(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    copy = folder.parent / "copy"
    write_byte_tokenizer(copy)
    assert load_tokenizer(copy).chat_template is None
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    for stored, expected in (("S", "S"), (named, "D"), (3, None)):
        (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stored}))
        assert load_tokenizer(copy).chat_template == expected
    (copy / "chat_template.jinja").write_text("J")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 256, 9999]}))
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    loaded = load_tokenizer(copy)
    assert loaded.chat_template == "J"
    assert loaded.end_ids == (10, 256)
    assert loaded.start_id is None


def test_an_unusable_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for content in ("{", "{}", "[]", "\x00"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match="not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokenizer(tmp_path)


def test_reading_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys, pathlib; import swarmnode.tensorfiles, swarmnode.presets;"
        "from swarmnode.tokenizer import load_tokenizer;"
        "load_tokenizer(pathlib.Path(sys.argv[1])).encode('x');"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
