"""Lightning's Trainer and Fabric, clipping by norm and by value."""

import pytest
import torch
from trainer_support import BITWISE, ROUNDING, check_program, learned, regression_data, regressor

pytorch_lightning = pytest.importorskip("pytorch_lightning")
lightning_fabric = pytest.importorskip("lightning_fabric")

# Lightning 2.6 on torch 2.14, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

BATCHES = 12
ALGORITHMS = pytest.mark.parametrize(
    ("algorithm", "clip", "tolerance"), [("norm", 1.0, ROUNDING), ("value", 0.1, BITWISE)]
)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*regression_data(8 * BATCHES)), batch_size=8)


class Regression(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = regressor()
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(clip, algorithm):
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression()
    trainer.fit(module, loader())
    return learned(module, losses=module.losses)


def train_with_fabric(clip, algorithm):
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    model = regressor()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for x, y in fabric.setup_dataloaders(loader()):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        fabric.backward(loss)
        if algorithm == "norm":
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        else:
            fabric.clip_gradients(model, optimizer, clip_val=clip)
        optimizer.step()
        losses.append(loss.item())
    return learned(model, losses=losses)


@ALGORITHMS
def test_trainer(algorithm, clip, tolerance):
    check_program(lambda limit: train(limit, algorithm), clip, calls=BATCHES // 2, tolerance=tolerance)


@ALGORITHMS
def test_fabric(algorithm, clip, tolerance):
    check_program(lambda limit: train_with_fabric(limit, algorithm), clip, calls=BATCHES, tolerance=tolerance)
