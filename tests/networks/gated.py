"""A source that a test can hold: a file ``limit`` beside this file says how many batches may pass.

A process that comes to one more leaves ``waits-PID`` there and waits. Without the file all pass.
"""

import os
import time
from pathlib import Path

from torch import Generator, Tensor, nn, no_grad, randn

MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)
SIZE = 16
CLASSES = [f"thing {i}" for i in range(12)]
GATE = Path(__file__).parent


def may_pass() -> bool:
    try:
        limit = int((GATE / "limit").read_text())
    except FileNotFoundError:
        return True
    for number in range(limit):
        try:
            (GATE / f"passed-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mark = GATE / f"waits-{os.getpid()}"
        while len(x) > 2 and not may_pass():  # sskt tests a source with one or two images
            mark.touch()
            time.sleep(0.01)
        mark.unlink(missing_ok=True)
        return x


def build() -> nn.Module:
    net = nn.Sequential(Gate(), nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(16 * 8 * 8, len(CLASSES)))
    generator = Generator().manual_seed(1)
    with no_grad():
        for value in net.parameters():
            value.copy_(randn(value.shape, generator=generator) / 8)
    return net
