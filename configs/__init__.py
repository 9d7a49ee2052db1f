"""Bundled topology files, device profiles and model configurations, read as package data."""

if __name__ != "v4_ascend.configs":
    raise ImportError(f"import v4_ascend.configs, not {__name__}")
