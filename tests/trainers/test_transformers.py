"""transformers.Trainer with a tiny Llama made from a config."""

import pytest
import torch
from trainer_support import check_program, learned

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 6


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def train(clip, folder):
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=clip,
        optim="sgd",  # Adam's steps would hardly depend on the clip coefficient
        learning_rate=5.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (8 * STEPS, 16))]
    trainer = transformers.Trainer(model=llama(), args=arguments, train_dataset=data)
    trainer.train()
    steps = trainer.state.log_history[:STEPS]
    return learned(trainer.model, losses=[step["loss"] for step in steps], norms=[step["grad_norm"] for step in steps])


def test_trainer(tmp_path):
    check_program(lambda limit: train(limit, tmp_path), clip=0.1, calls=STEPS)
