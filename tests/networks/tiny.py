"""A source as a user would bring one: small, with BatchNorm, the same weights every time."""

from torch import Generator, nn, no_grad, rand, randn

MEAN = (0.5, 0.4, 0.3)
STD = (0.2, 0.25, 0.3)
SIZE = 16
CLASSES = [f"thing {i}" for i in range(12)]


def build() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, len(CLASSES)),
    )
    generator = Generator().manual_seed(1)
    with no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                positive = "running_var" in name
                draw = rand if positive else randn
                value.copy_(draw(value.shape, generator=generator) + (0.5 if positive else 0))
    return net
