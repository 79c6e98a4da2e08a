"""Small things that several test files use."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

TINY = Path(__file__).with_name("networks") / "tiny.py"


def write_images(folder: Path, pictures: Any) -> None:
    """PNGs 0000.png, 0001.png, ... from uint8 ``[n, H, W, 3]``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:04d}.png")


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under ``folder``, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
