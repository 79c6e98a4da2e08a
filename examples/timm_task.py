"""A distillation task of timm, trained from stored labels: the teacher is the line that changes.

It needs the extras ``timm`` and ``lite``. The student learns the teacher's 1,000 classes.
"""

import tempfile

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask

import sskt

EPOCHS, TEMPERATURE = 2, 2.0
cache = tempfile.mkdtemp()

target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(target, "imagenet:efficientnet_lite0@64", cache=cache, seeds=EPOCHS)
loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=32, epochs=EPOCHS)

torch.manual_seed(0)
task = LogitDistillationTask(
    timm.create_model("resnet10t", num_classes=1000),
    teacher_model=sskt.TimmTeacher(loader, temperature=TEMPERATURE),  # was: "efficientnet_lite0"
    task_loss_weight=0.0,  # the rest of the weight is the teacher's
    temperature=TEMPERATURE,
    device=loader.device,
)
optimizer = create_optimizer_v2(task, opt="adamw", lr=1e-3, weight_decay=0.05)

for epoch in range(EPOCHS):
    task.train()
    for batch in loader:
        found = task(batch.images, batch.labels)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {found['kd_loss'].item():.3f}")
