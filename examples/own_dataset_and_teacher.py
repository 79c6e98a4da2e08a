"""A dataset, a teacher and a student of your own, all from Python."""

import tempfile

from torch import nn, optim
from torch.utils.data import Dataset

import sskt


class Own(Dataset):  # any map-style dataset of (PIL image or uint8 [H, W, 3], class)
    data = sskt.open_target("shapes", limit=256)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data.read(i), int(self.data.labels[i])


def network(classes):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), *pooled)


cache, half = tempfile.mkdtemp(), (0.5, 0.5, 0.5)
target = sskt.open_target(Own(), name="my-shapes")
teacher = sskt.freeze(network(12), name="mine", size=32, mean=half, std=half)
sskt.cache_teachers(target, teacher, cache=cache, seeds=2, policy="pad-crop-flip")
loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=64)
model = sskt.SSKTNetwork(network(10), loader.source_classes, classes=10).to(loader.device)
optimizer = optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(4):
    for batch in loader:
        logits, auxiliary = model(batch.images)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        loss = loss + sskt.soft_cross_entropy(auxiliary["mine"], batch.soft("mine"), 1.0)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
