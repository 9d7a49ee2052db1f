"""Chat: prompts as DeepSeek encodes them, completions parsed back."""
