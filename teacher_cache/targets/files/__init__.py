"""Lists of files: reading folders, and what is remembered about files between commands."""
