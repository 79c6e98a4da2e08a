"""SSKT in Lightning: a DataModule with the labels, and a module whose loss is equation 1.

It needs Lightning (``pip install lightning``) and a source (extra ``lite``).
"""

import tempfile

import lightning as L
import torch

import sskt

TEMPERATURE, EPOCHS = 2.0, 2


class Labels(L.LightningDataModule):
    def __init__(self, cache):
        super().__init__()
        self.cache, self.target = cache, sskt.open_target("shapes", limit=128)

    def prepare_data(self):  # in one process; what is stored is kept
        source = "imagenet:efficientnet_lite0@64"
        sskt.cache_teachers(self.target, source, cache=self.cache, seeds=EPOCHS)

    def train_dataloader(self):
        return sskt.SoftLabelLoader(self.target, cache=self.cache, batch_size=32, epochs=EPOCHS)


class Student(L.LightningModule):
    def __init__(self, classes, sources):
        super().__init__()
        self.network = sskt.SSKTNetwork("resnet20", sources, classes=classes)

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


data = Labels(tempfile.mkdtemp())
trainer = L.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False)
trainer.fit(Student(len(data.target.classes), {"imagenet": 1000}), data)
print(f"loss {trainer.callback_metrics['loss_epoch'].item():.3f}")
