"""A timm network as the student, with stages for transfer modules and timm's optimiser.

It needs the extras ``timm`` and ``lite``.
"""

import tempfile

import timm
import torch
from timm.optim import create_optimizer_v2

import sskt

EPOCHS, TEMPERATURE = 2, 2.0
cache = tempfile.mkdtemp()

target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(target, "imagenet:efficientnet_lite0@64", cache=cache, seeds=EPOCHS)
loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=32, epochs=EPOCHS)

torch.manual_seed(0)
student = timm.create_model("resnet10t", num_classes=len(target.classes))
model = sskt.SSKTNetwork(
    student,
    loader.source_classes,
    classes=len(target.classes),
    tm=True,  # the stages are those that timm lists
    size=48,
).to(loader.device)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)

for epoch in range(EPOCHS):
    for batch in loader:  # without set_epoch, each pass is the next epoch
        logits, auxiliary = model(batch.images)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        for name, z in auxiliary.items():
            loss = loss + sskt.soft_cross_entropy(z, batch.soft(name, TEMPERATURE), TEMPERATURE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
