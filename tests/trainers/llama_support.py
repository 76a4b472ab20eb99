"""A tiny Llama made from a config, and arguments for transformers.Trainer that keep it quiet and on the CPU."""

import pytest
import trainer_support  # noqa: F401, sets the environment that transformers reads when it is imported

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


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


def training_arguments(folder, **arguments):
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
        **arguments,
    )
