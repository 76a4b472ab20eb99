"""timm's NativeScaler, as its train.py calls it, with a small vision transformer."""

import pytest
import torch
from trainer_support import BITWISE, ROUNDING, check_program, learned

timm = pytest.importorskip("timm")

STEPS = 6


def train(clip, mode):
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(STEPS, 8, 3, 16, 16), torch.randint(4, (STEPS, 8))
    scaler = timm.utils.NativeScaler(device="cpu")
    losses = []
    for image, label in zip(images, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=clip, clip_mode=mode, parameters=model.parameters())
        losses.append(loss.item())
    return learned(model, losses=losses)


@pytest.mark.parametrize(("mode", "clip", "tolerance"), [("norm", 0.1, ROUNDING), ("value", 0.001, BITWISE)])
def test_native_scaler(mode, clip, tolerance):
    check_program(lambda limit: train(limit, mode), clip, calls=STEPS, tolerance=tolerance)
