"""Trainings as TOML."""
