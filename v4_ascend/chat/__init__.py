"""Chat: prompts as DeepSeek encodes them, completions parsed back."""

from v4_ascend.chat.deltas import (
    ArgumentsDelta,
    Completion,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
)
from v4_ascend.chat.encoding import encode_messages, encoder_release
from v4_ascend.chat.prompt import Prompt, Segment
from v4_ascend.chat.stop import StopMatcher
from v4_ascend.chat.stream import StreamParser, parse_completion
from v4_ascend.chat.strings import Effort, Release
from v4_ascend.chat.tokenizer import ChatTokenizer, TokenStream

__all__ = [
    "ArgumentsDelta",
    "ChatTokenizer",
    "Completion",
    "ContentDelta",
    "Delta",
    "Effort",
    "Prompt",
    "ReasoningDelta",
    "Release",
    "Segment",
    "StopMatcher",
    "StreamParser",
    "TokenStream",
    "ToolCall",
    "ToolCallDelta",
    "encode_messages",
    "encoder_release",
    "parse_completion",
]
