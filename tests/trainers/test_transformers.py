"""transformers.Trainer with a tiny Llama made from a config."""

import torch
from llama_support import llama, training_arguments, transformers
from trainer_support import check_program, learned

STEPS = 6


def train(clip, folder):
    arguments = training_arguments(
        folder,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        max_grad_norm=clip,
        optim="sgd",  # Adam's steps would hardly depend on the clip coefficient
        learning_rate=5.0,
        logging_steps=1,
        save_strategy="no",
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (8 * STEPS, 16))]
    trainer = transformers.Trainer(model=llama(), args=arguments, train_dataset=data)
    trainer.train()
    steps = trainer.state.log_history[:STEPS]
    return learned(trainer.model, losses=[step["loss"] for step in steps], norms=[step["grad_norm"] for step in steps])


def test_trainer(tmp_path):
    check_program(lambda limit: train(limit, tmp_path), clip=0.1, calls=STEPS)
