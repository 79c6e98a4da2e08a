"""Random access to rows of label sets."""
