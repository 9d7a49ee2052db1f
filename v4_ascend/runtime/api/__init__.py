"""The HTTP APIs: each a reader of its requests and a writer of its answers over one service."""
