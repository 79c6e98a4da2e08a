"""What the golden values of networks are: seeded networks, a seeded batch, its loss and gradients.

python tests/network_cases.py in the checkout's root prints tests/golden/networks.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sskt.trainer.heads import SSKTNetwork
from sskt.trainer.losses import AUXILIARY, PRIMARY, total_loss
from sskt.trainer.networks import TargetNetwork, build_network, is_three_dimensional

CLASSES, SOURCES, BATCH = 5, {"imagenet": 12}, 4


@dataclass(frozen=True)
class Case:
    """A network at a small picture; a clip has 8 frames."""

    name: str
    size: int
    stem: str = "auto"
    shortcut: str = "b"

    def __str__(self) -> str:
        form = self.shortcut if is_three_dimensional(self.name) else self.stem
        return f"{self.name}-{form}-{self.size}"

    def target(self) -> TargetNetwork:
        return build_network(
            self.name, CLASSES, stem=self.stem, shortcut=self.shortcut, size=self.size
        )

    def network(self, *, tm: bool) -> SSKTNetwork:
        """Fresh parameters from seed 3; no dropout, whose mask is no property of the network."""
        torch.manual_seed(3)
        network = SSKTNetwork(self.target(), SOURCES, tm=tm)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return network

    def batch(self) -> Tensor:
        """Noise, and in each sample a slope of its own: BatchNorm needs samples that differ."""
        clip = (8,) if is_three_dimensional(self.name) else ()
        shape = (BATCH, 3, *clip, self.size, self.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        ramp = torch.linspace(-1, 1, self.size)
        for k in range(BATCH):
            noise[k] += k * ramp.roll(7 * k)
        return noise


CASES = (
    Case("resnet20", 16),
    Case("resnet18", 64, "imagenet"),
    Case("resnet50", 64, "imagenet"),
    Case("mobilenet_v2", 32),
    Case("densenet121", 32),
    Case("vgg16", 32),
    Case("resnet3d10", 32, shortcut="a"),
    Case("resnet3d18", 32),
)


def run(network: SSKTNetwork, x: Tensor) -> dict[str, list[float]]:
    """Forward, the loss of equation 1 (T = 3, alpha = 0.1, fixed soft labels), backward.

    ``loss``; mean and mean magnitude of each head's logits; norms of the gradients of target,
    classifier and auxiliary heads.
    """
    primary, auxiliary = network(x)
    parts = {
        name: AUXILIARY["ce"](z, torch.softmax(3 * torch.eye(*z.shape), 1), 3.0, 0.0)
        for name, z in auxiliary.items()
    }
    truth = torch.arange(BATCH) % CLASSES
    loss = total_loss(PRIMARY["ce"](primary, truth, 0.0), parts, 0.1)
    torch.autograd.backward(loss)
    found = {"loss": [loss.item()]}
    for name, z in {"primary": primary, **auxiliary}.items():
        found[name] = [z.mean().item(), z.abs().mean().item()]
    found["gradients"] = [_norm(m) for m in (network.target, network.target.fc, network.heads)]
    return found


def _norm(module: nn.Module) -> float:
    gradients = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(gradients).norm().item())


def main() -> None:
    lines = []
    for case in CASES:
        for tm in (False, True):
            found = run(case.network(tm=tm), case.batch())
            values = {key: [float(f"{x:.6g}") for x in row] for key, row in found.items()}
            lines.append(f"{json.dumps(f'{case}-tm' if tm else str(case))}: {json.dumps(values)}")
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
