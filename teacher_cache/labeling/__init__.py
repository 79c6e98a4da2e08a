"""Labeling a target with sources."""
