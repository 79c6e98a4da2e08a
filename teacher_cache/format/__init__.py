"""The stored format: encodings, identity, JSON documents and checksums of label sets."""
