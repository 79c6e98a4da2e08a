"""Comparisons with other ways of doing the same, which ``sskt bench`` runs in turn."""
