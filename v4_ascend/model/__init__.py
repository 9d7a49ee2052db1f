"""The DeepSeek-V4 network, built from ops."""
