"""Copying, removing, exporting, verifying and auditing label sets."""
