"""transformers.Trainer(optimizers=(ClippedOptimizer, scheduler)), with a checkpoint in the middle."""

import torch
from llama_support import llama, training_arguments, transformers

import fastclip

STEPS = 4


def train(wrap, folder, resume=False):
    torch.manual_seed(0)
    model = llama()
    inner = torch.optim.SGD(model.parameters(), 5.0, momentum=0.9, fused=True)
    optimizer = fastclip.ClippedOptimizer(inner, 0.1) if wrap else inner
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    arguments = training_arguments(folder, max_steps=STEPS, max_grad_norm=0.0 if wrap else 0.1, save_steps=2)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (4 * STEPS, 8))]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    assert wrap == isinstance(trainer.optimizer.optimizer, fastclip.ClippedOptimizer)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_trainer(tmp_path):
    want = train(wrap=False, folder=tmp_path / "torch")
    got = train(wrap=True, folder=tmp_path / "fastclip")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    resumed = train(wrap=True, folder=tmp_path / "torch", resume=True)  # from a checkpoint of the bare optimizer
    torch.testing.assert_close(resumed, want, rtol=1e-4, atol=1e-5)
