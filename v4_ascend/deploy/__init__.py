"""Deployment: launchers, state, health."""
