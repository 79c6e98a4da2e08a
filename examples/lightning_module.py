"""SSKT in Lightning: the loader is the training dataloader, the loss is equation 1.

It needs Lightning (``pip install lightning``) and a source (extra ``lite``).
"""

import tempfile

import lightning as L
import torch

import sskt

TEMPERATURE, EPOCHS = 2.0, 2


class Student(L.LightningModule):
    def __init__(self, classes, source_classes):
        super().__init__()
        self.network = sskt.SSKTNetwork("resnet20", source_classes, classes=classes)

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def training_step(self, batch):
        logits, auxiliary = self.network(batch.images)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        for name, z in auxiliary.items():
            loss = loss + sskt.soft_cross_entropy(z, batch.soft(name, TEMPERATURE), TEMPERATURE)
        self.log("loss", loss, batch_size=len(batch), on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


cache = tempfile.mkdtemp()
target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(target, "imagenet:efficientnet_lite0@64", cache=cache, seeds=EPOCHS)
loader = sskt.SoftLabelLoader(target, cache=cache, batch_size=32, epochs=EPOCHS)
trainer = L.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False)
trainer.fit(Student(len(target.classes), loader.source_classes), loader)
print(f"loss {trainer.callback_metrics['loss_epoch'].item():.3f}")
