"""SSKT in the Trainer of Hugging Face's transformers: the loader's batches, and equation 1.

It needs ``pip install transformers accelerate`` and the extra ``lite``.
"""

import tempfile

import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

import sskt

TEMPERATURE, EPOCHS = 2.0, 2


class Batches(sskt.SoftLabelLoader):
    def __iter__(self):
        return ({"batch": batch} for batch in super().__iter__())


class SSKTTrainer(Trainer):
    def get_train_dataloader(self):
        return loader

    def compute_loss(self, model, inputs, **_):
        batch = inputs["batch"]  # the Trainer wants dictionaries
        logits, auxiliary = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        for name, z in auxiliary.items():
            loss = loss + sskt.soft_cross_entropy(z, batch.soft(name, TEMPERATURE), TEMPERATURE)
        return loss


cache = tempfile.mkdtemp()
target = sskt.open_target("shapes", limit=128)
sskt.cache_teachers(target, "imagenet:efficientnet_lite0@64", cache=cache, seeds=EPOCHS)
loader = Batches(target, cache=cache, batch_size=32, epochs=EPOCHS)
network = sskt.SSKTNetwork("resnet20", loader.source_classes, classes=len(target.classes))
arguments = TrainingArguments(
    tempfile.mkdtemp(), num_train_epochs=EPOCHS, learning_rate=1e-3, logging_strategy="epoch",
    save_strategy="no", report_to="none",
)  # fmt: skip
trainer = SSKTTrainer(network, arguments)
trainer.train()
for found in trainer.state.log_history[:EPOCHS]:
    print(f"epoch {found['epoch']:g}: loss {found['loss']:.3f}")
