"""skorch's GradientNormClipping callback."""

import pytest
import torch
from trainer_support import check_program, learned, regression_data, regressor

skorch = pytest.importorskip("skorch")

EPOCHS, BATCHES = 2, 6


@pytest.mark.parametrize("norm_type", [2, "inf"])
def test_gradient_norm_clipping(norm_type):
    def train(clip):
        net = skorch.NeuralNetRegressor(
            regressor(),
            max_epochs=EPOCHS,
            batch_size=8,
            lr=0.1,
            optimizer=torch.optim.SGD,
            train_split=None,
            callbacks=[skorch.callbacks.GradientNormClipping(clip, norm_type)],
            device="cpu",
            verbose=0,
        )
        net.fit(*regression_data(8 * BATCHES))
        return learned(net.module_, losses=net.history[:, "train_loss"])

    check_program(train, clip=1.0, calls=EPOCHS * BATCHES)
