"""Lightning's Trainer with a ClippedOptimizer from configure_optimizers."""

import pytest
import torch

import fastclip

pytorch_lightning = pytest.importorskip("pytorch_lightning")

# Lightning 2.6 on torch 2.14, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")


class Regression(pytorch_lightning.LightningModule):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.model = torch.nn.Linear(8, 1)

    def training_step(self, batch, index):
        return (self.model(batch) - 5).square().mean()

    def configure_optimizers(self):
        inner = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        optimizer = fastclip.ClippedOptimizer(inner, 0.5) if self.wrap else inner
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


def train(wrap):
    torch.manual_seed(0)
    module = Regression(wrap)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=None if wrap else 0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=4))
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, fastclip.ClippedOptimizer) == wrap
    return module.model.weight.detach(), optimizer.param_groups[0]["lr"]


def test_trainer():
    weight, lr = train(wrap=False)
    clipped, clipped_lr = train(wrap=True)
    assert clipped_lr == lr < 0.1
    torch.testing.assert_close(clipped, weight, rtol=1e-5, atol=1e-6)
