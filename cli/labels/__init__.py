"""Commands that make, show and move label sets."""
