"""Structured output: which tokens a grammar allows next, by llguidance.

A mask is computed where the token is drawn, from the tokens the steps bring: 16 KB of bits a
sequence and step need not travel to every rank. The grammar itself travels once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from v4_ascend.chat import ChatTokenizer
from v4_ascend.errors import RequestError


class _Vocabulary:
    """A tokenizer as llguidance's wrapper wants it. Markers are no text: a grammar names them."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        texts = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        markers = tokenizer.marker_ids
        self.special_token_ids = [i for i, text in enumerate(texts) if i in markers or not text]
        # llguidance would allow a token without text wherever any marker may come.
        self.tokens = [text or b"<unused %d>" % i for i, text in enumerate(texts)]
        self._encode = tokenizer.encode_plain

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class GuideFactory:
    """Makes guides for one tokenizer; `vocab_size` is the model's."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))

    def require_valid(self, grammar: str, param: str) -> None:
        """Raise RequestError unless llguidance takes the grammar."""
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise RequestError(f"{param}: {' '.join(problem.split())}", param=param)

    def guide(self, grammar: str) -> Guide:
        """Begin to follow a grammar; a wrong one is the guide's `error`."""
        return Guide(LLMatcher(self._tokenizer, grammar, log_level=0), self._vocab_size)


class Guide:
    """Follows one completion."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def error(self) -> str | None:
        """What stopped llguidance, such as a limit of its own."""
        return self._matcher.get_error() or None

    @property
    def is_complete(self) -> bool:
        """Whether only the end token may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Guide:
        """Return one that goes its own way from here."""
        return Guide(self._matcher.deep_copy(), self._vocab_size)

    def take(self, drawn: Sequence[int]) -> None:
        """Go on by drawn tokens."""
        for token in drawn:
            if not self._matcher.is_stopped():  # the end token after that is no part of it
                self._matcher.consume_token(token)

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, ``[vocab_size]`` bool."""
        words = allocate_token_bitmask(1, self._vocab_size)
        fill_next_token_bitmask(self._matcher, words)
        bits = np.unpackbits(words[0].view(np.uint8), count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)
