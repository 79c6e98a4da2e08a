"""Frozen source networks: the known ones, timm's, a user's own."""
