"""The tokenizer of a checkpoint, and text from tokens one at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from v4_ascend.chat.byte_level import bytes_of_token
from v4_ascend.chat.byte_tokenizer import write_byte_tokenizer
from v4_ascend.chat.prompt import Prompt
from v4_ascend.chat.strings import BOS, CONTROL_MARKERS, EOS
from v4_ascend.errors import CheckpointError

__all__ = ["ChatTokenizer", "TokenStream", "write_byte_tokenizer"]


class ChatTokenizer:
    """A V4 tokenizer: text and prompts to ids, ids to text."""

    def __init__(self, tokenizer: Tokenizer, *, bos: str, eos: str) -> None:
        self._tokenizer = tokenizer
        # The same vocabulary without added tokens: in user text no literal is a control token.
        self._plain = Tokenizer(tokenizer.model)
        self._plain.normalizer = tokenizer.normalizer
        self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        self._token_bytes = _token_bytes(tokenizer)
        self.marker_ids = frozenset(tokenizer.get_added_tokens_decoder())
        self.bos_id = self.token_id(bos)
        self.eos_id = self.token_id(eos)
        self._control_ids = {marker: self.token_id(marker) for marker in CONTROL_MARKERS}

    @classmethod
    def load(cls, directory: Path) -> ChatTokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json of a checkpoint.

        Raises:
            CheckpointError: a file is missing or unreadable, or a marker of V4 is not a token.

        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a V4 checkpoint has one")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # noqa: BLE001  tokenizers raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer: {e}") from e
        config = _read_config(directory / "tokenizer_config.json")
        try:
            return cls(
                tokenizer, bos=config.get("bos_token", BOS), eos=config.get("eos_token", EOS)
            )
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from e

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self._token_bytes)

    def token_id(self, content: str) -> int:
        """Look up a token by its text.

        Raises:
            CheckpointError: there is no such token.

        """
        token = self._tokenizer.token_to_id(content)
        if token is None:
            raise CheckpointError(f"{content!r} is not a token; a V4 tokenizer has it")
        return token

    def encode(self, text: str) -> list[int]:
        """Encode text in which a marker is its token, as the official tokenizer does."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Encode text in which a marker is only the characters it is written with."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a prompt; only the markers the encoder wrote become control tokens."""
        ids: list[int] = []
        for segment in prompt.segments:
            if segment.is_control:
                ids.append(self._control_ids[segment.text])
            else:
                ids.extend(self.encode_plain(segment.text))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, control tokens included; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return what a token stands for; nothing if the tokenizer does not know the id."""
        return self._token_bytes.get(token, b"")


class TokenStream:
    """Text of a growing list of tokens: only complete characters, each as soon as it is."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the characters that `token` completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return U+FFFD for a character that stayed incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    added = tokenizer.get_added_tokens_decoder()
    table = {
        token: bytes_of_token(content)
        for content, token in tokenizer.get_vocab(with_added_tokens=False).items()
    }
    return table | {token: entry.content.encode() for token, entry in added.items()}


def _read_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; its tokens are strings, or objects with their `content`."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path}: not JSON: {e}") from e
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in config.items()
        if value is not None
    }
