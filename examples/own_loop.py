"""SSKT in a PyTorch loop of your own: the lines with ``sskt`` or ``loader`` are all that it adds.

It needs the extra ``lite``.
"""

import tempfile

import torch
import torch.nn.functional as F

import sskt

ALPHA, TEMPERATURE, EPOCHS = 1.0, 2.0, 2
cache = tempfile.mkdtemp()

torch.manual_seed(0)
target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(target, "imagenet:efficientnet_lite0@64", cache=cache, seeds=EPOCHS)

loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=32, epochs=EPOCHS)
model = sskt.SSKTNetwork(
    "resnet20", loader.source_classes, classes=len(target.classes), tm=True
).to(loader.device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for epoch in range(EPOCHS):
    loader.set_epoch(epoch)  # view seed = epoch mod S; the next labels are read ahead
    for batch in loader:
        logits, auxiliary = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        for name in loader.sources:
            soft = batch.soft(name, TEMPERATURE)
            loss = loss + ALPHA * sskt.soft_cross_entropy(auxiliary[name], soft, TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
