"""A tokenizer for synthetic checkpoints: one token per byte, and every marker of V4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v4_ascend.chat.byte_level import CHARACTER_OF_BYTE
from v4_ascend.chat.strings import ADDED_TOKENS, BOS, EOS
from v4_ascend.errors import ConfigError

_N_RESERVED = 3  # bos, eos and pad keep their official ids 0, 1, 2; the bytes follow
MODEL_MAX_LENGTH = 1048576  # tokens; the official tokenizer_config.json
MIN_VOCAB_SIZE = len(ADDED_TOKENS) + len(CHARACTER_OF_BYTE)


def write_byte_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; ids from the last marker on stay unused.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes and the markers.

    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            "vocab_size",
            f"{vocab_size} is too small for a byte tokenizer; {len(CHARACTER_OF_BYTE)} bytes "
            f"and {len(ADDED_TOKENS)} markers need at least {MIN_VOCAB_SIZE}",
        )
    _write_json(directory / "tokenizer.json", _tokenizer())
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())


def _tokenizer() -> dict[str, Any]:
    markers = [token.content for token in ADDED_TOKENS]
    in_order = [*markers[:_N_RESERVED], *CHARACTER_OF_BYTE, *markers[_N_RESERVED:]]
    ids = {content: index for index, content in enumerate(in_order)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token.content],
                "content": token.content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token.normalized,
                "special": token.special,
            }
            for token in ADDED_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {content: ids[content] for content in in_order[: -len(markers[_N_RESERVED:])]},
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
