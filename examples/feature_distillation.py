"""Feature distillation in a PyTorch loop of your own.

A ResNet-20 learns features of EfficientNet-Lite0. It needs the extra ``lite``.
"""

import tempfile

import torch
import torch.nn.functional as F

import sskt

ALPHA, EPOCHS = 1.0, 2
cache = tempfile.mkdtemp()

torch.manual_seed(0)
target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(
    target, "imagenet:efficientnet_lite0@64", output="features", cache=cache, seeds=EPOCHS
)

loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=32, epochs=EPOCHS)
model = sskt.SSKTNetwork(  # each auxiliary head projects to the 1,280 features of its source
    "resnet20", loader.source_widths, classes=len(target.classes), tm=True
).to(loader.device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

for epoch in range(EPOCHS):
    loader.set_epoch(epoch)  # view seed = epoch mod S; the next features are read ahead
    for batch in loader:
        logits, projected = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        for name in loader.sources:
            similarity = F.cosine_similarity(projected[name], batch.features(name))
            loss = loss + ALPHA * (1 - similarity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
