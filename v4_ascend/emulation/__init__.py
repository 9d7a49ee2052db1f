"""Checks of accelerator code on machines without the accelerator."""
