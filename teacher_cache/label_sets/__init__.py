"""Label sets: opening, reading, creating and finding them."""
