"""The byte-level alphabet: BPE files write each byte as one printable character."""

from __future__ import annotations


def _alphabet() -> list[str]:
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTER_OF_BYTE: tuple[str, ...] = tuple(_alphabet())  # GPT-2's table, which all BPE files use
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}


def bytes_of_token(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for."""
    if any(character not in _BYTE_OF_CHARACTER for character in token):
        return token.encode()  # not written in the alphabet: a marker listed in the vocabulary
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)
