"""Parameter shapes of real models, computed from their published configurations.

``tests/test_benchmarks.py`` compares the counts with the published ones. Shapes are those of the gradients, in the
order of ``model.parameters()``; where a matrix stands transposed does not matter for clipping.
"""

from collections.abc import Sequence

Shapes = Sequence[tuple[int, ...]]


def resnet50() -> Shapes:
    """ResNet-50 (He et al. 2016; torchvision): 161 tensors, 25,557,032 elements."""

    def convolution(outputs: int, inputs: int, kernel: int) -> Shapes:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its batch norm

    shapes, inputs = [*convolution(64, 3, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [*convolution(width, inputs, 1), *convolution(width, width, 3), *convolution(4 * width, width, 1)]
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def bert_base() -> Shapes:
    """BERT-base, uncased (Devlin et al. 2019), with its pooler: 199 tensors, 109,482,240 elements."""
    width = 768
    norm = [(width,), (width,)]
    square = [(width, width), (width,)]
    layer = [*(4 * square), *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,), *norm]
    return [(30522, width), (512, width), (2, width), *norm, *(12 * layer), *square]


def gpt2(width: int, layers: int) -> Shapes:
    """GPT-2 (Radford et al. 2019), the head tied to the embedding.

    Small: width 768, 12 layers, 148 tensors, 124,439,808 elements. XL: width 1600, 48 layers, 580 tensors,
    1,557,611,200 elements. With width 768 and 6 layers it is DistilGPT-2: 76 tensors, 81,912,576 elements.
    """
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(layers * (norm + attention + norm + mlp)), *norm]


def gpt2_small() -> Shapes:
    return gpt2(768, 12)


def gpt2_xl() -> Shapes:
    return gpt2(1600, 48)


def distil_gpt2() -> Shapes:
    return gpt2(768, 6)


def vit_large() -> Shapes:
    """ViT-L/16 for 224 x 224 images (Dosovitskiy et al. 2021; torchvision): 296 tensors, 304,326,632 elements."""
    width = 1024
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    patches = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 14 * 14 + 1, width)]
    return [*patches, *(24 * (norm + attention + norm + mlp)), *norm, (1000, width), (1000,)]


def llama3_8b() -> Shapes:
    """Llama 3 8B (Grattafiori et al. 2024): 291 tensors, 8,030,261,248 elements."""
    width, hidden, keys = 4096, 14336, 1024  # 8 heads for keys and values, of 128
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    return [(128256, width), *(32 * [*attention, *mlp, (width,), (width,)]), (width,), (128256, width)]


def olmoe() -> Shapes:
    """OLMoE-1B-7B (Muennighoff et al. 2024): 64 experts in 16 layers, 3,219 tensors, 6,919,161,856 elements."""
    width, hidden, experts, words = 2048, 1024, 64, 50304
    attention = [*(4 * [(width, width)]), (width,), (width,)]  # the last two: norms of queries and keys
    expert = [(hidden, width), (hidden, width), (width, hidden)]
    layer = [*attention, (experts, width), *(experts * expert), (width,), (width,)]
    return [(words, width), *(16 * layer), (width,), (words, width)]


def shard(shapes: Shapes, ranks: int) -> Shapes:
    """What one of ``ranks`` holds where every tensor is divided along its first dimension, as FSDP2 does."""
    uneven = [shape for shape in shapes if shape[0] % ranks]
    if uneven:
        raise ValueError(f"ranks: expected a divisor of every first dimension, got {ranks} for {uneven[0]}")
    return [(shape[0] // ranks, *shape[1:]) for shape in shapes]


def lstm_text_model() -> Shapes:
    """Two LSTM layers of width 512 over 256-wide embeddings of 7,600 words: 11 tensors, 5,755,136 elements.

    No publication has just this one; it is of the kind of Zaremba et al. 2014, whose "medium" model has 20 million.
    """
    words, embedding, width = 7600, 256, 512

    def layer(inputs: int) -> Shapes:
        return [(4 * width, inputs), (4 * width, width), (4 * width,), (4 * width,)]

    return [(words, embedding), *layer(embedding), *layer(width), (256, width), (256,)]


def rl_policy() -> Shapes:
    """The policy of stable-baselines3's ``MlpPolicy`` on CartPole, without its value network: 6 tensors, 4,610."""
    return [(64, 4), (64,), (64, 64), (64,), (2, 64), (2,)]


def actor_critic() -> Shapes:
    """stable-baselines3's whole ``MlpPolicy`` on CartPole, policy and value: 12 tensors, 9,155 elements."""
    network = [(64, 4), (64,), (64, 64), (64,)]
    return [*network, *network, (2, 64), (2,), (1, 64), (1,)]


def nature_dqn(actions: int = 4) -> Shapes:
    """The Atari network of Mnih et al. 2015, for Breakout's four actions: 10 tensors, 1,686,180 elements."""
    convolutions = [(32, 4, 8, 8), (32,), (64, 32, 4, 4), (64,), (64, 64, 3, 3), (64,)]
    return [*convolutions, (512, 3136), (512,), (actions, 512), (actions,)]


def elements(shapes: Shapes) -> int:
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total
