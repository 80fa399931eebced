"""Tokenizers without torch: a byte-level default, and a light reader of any tokenizer folder."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from swarmnode.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BYTE_VOCAB_SIZE = 257
"""256 bytes, each with its own value as id, and `END_OF_TEXT` as id 256."""
MAX_TOKENIZER_BYTES = 64 << 20
MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back."""

    num_tokens: int
    """Ids are 0 .. num_tokens - 1; a model needs at least this vocabulary."""
    end_ids: tuple[int, ...]
    """Ids that end a text or a turn, sorted; empty if the folder names none."""
    start_id: int | None
    """Put before a text when the folder names such a token."""
    chat_template: str | None
    """Jinja source as the folder gives it: to be rendered in a sandbox only."""
    _plain: Tokenizer
    _special: Tokenizer

    def encode(self, text: str, *, with_special: bool = False) -> list[int]:
        """Return the ids of `text`, nothing added before or after.

        `with_special` reads special tokens written in the text (a rendered chat template) as
        such; otherwise, as for anything a user wrote, they are plain characters.
        """
        tokenizer = self._special if with_special else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=skip_special)
        return text


def write_byte_tokenizer(folder: Path, *, max_positions: int = 512) -> None:
    """Write the byte-level tokenizer as a folder that `AutoTokenizer` and `load_tokenizer` read.

    `encode(text)` is the text's UTF-8 bytes; there are no merges and nothing is added.
    The folder is written beside its place and renamed; an existing one is replaced.
    Raises: DataError if it cannot be written.
    """
    # ByteLevel writes each byte as one printable character; that character's id is the byte.
    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read a folder with `tokenizer.json`, and `tokenizer_config.json` if there is one.

    Raises: DataError if it is missing, over its size limit or not a tokenizer.
    """
    source = _read_text(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    if source is None:
        raise DataError(f"{folder} has no tokenizer.json")
    try:
        plain, special = Tokenizer.from_str(source), Tokenizer.from_str(source)
    except BaseException as error:  # the library raises nothing narrower; a panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{folder / 'tokenizer.json'} is not a tokenizer") from error
    plain.encode_special_tokens = True
    for tokenizer in (plain, special):
        tokenizer.no_padding()
        tokenizer.no_truncation()
    config = _read_object(folder / "tokenizer_config.json")
    generation = _read_object(folder / "generation_config.json")
    end_ids = _ids(generation.get("eos_token_id")) | _token_ids(plain, config.get("eos_token"))
    num_tokens = 1 + max(plain.get_vocab(with_added_tokens=True).values(), default=-1)
    return TextTokenizer(
        num_tokens=num_tokens,
        end_ids=tuple(sorted(id_ for id_ in end_ids if id_ < num_tokens)),
        start_id=min(_token_ids(plain, config.get("bos_token")), default=None),
        chat_template=_chat_template(folder, config),
        _plain=plain,
        _special=special,
    )


def _byte_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte: GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    template = _read_text(folder / "chat_template.jinja", MAX_CONFIG_BYTES)
    if template is not None:
        return template
    stored = config.get("chat_template")
    if isinstance(stored, list):  # several named templates: the default one
        named = {t.get("name"): t.get("template") for t in stored if isinstance(t, dict)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def _token_ids(tokenizer: Tokenizer, token: Any) -> set[int]:
    text = token.get("content") if isinstance(token, dict) else token
    return _ids(tokenizer.token_to_id(text)) if isinstance(text, str) else set()


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if type(v) is int and v >= 0}


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path, MAX_CONFIG_BYTES)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def _read_text(path: Path, max_bytes: int) -> str | None:
    """Return a file's text, or None if there is no such file. Raises: DataError if too large."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise DataError(f"{path} is larger than {max_bytes} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
