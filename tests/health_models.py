"""Models that train well, and models with one planted fault each. Every entry: (seed, size, dtype) -> Trial.

Sizes 1, 2, 3 scale the width. Tasks are synthetic; a healthy trial learns, with a threshold that fits its norms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from health_support import Trial
from torch import Tensor, nn

Build = Callable[[int, int, torch.dtype], Trial]


def batches(seed: int, make: Callable[[torch.Generator], tuple], dtype: torch.dtype) -> Callable[[int], tuple]:
    """The data of a step, the same whenever it is asked for; floating-point tensors in the model's dtype."""

    def at(step: int) -> tuple:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in make(generator))

    return at


def vectors(seed: int, dtype: torch.dtype, n: int = 64, width: int = 16, classes: int = 4) -> Callable[[int], tuple]:
    """Points to be told apart by a fixed random teacher."""
    teacher = torch.randn(width, classes, generator=torch.Generator().manual_seed(seed + 77))

    def make(generator: torch.Generator) -> tuple:
        x = torch.randn(n, width, generator=generator)
        return x, (x @ teacher).argmax(1)

    return batches(seed, make, dtype)


def tokens(seed: int, n: int = 16, length: int = 24, vocabulary: int = 40) -> Callable[[int], tuple]:
    """Sequences in which the next token follows from the last one, with noise."""
    follow = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed + 5))

    def make(generator: torch.Generator) -> tuple:
        x = torch.randint(vocabulary, (n, length + 1), generator=generator)
        for t in range(length):
            keep = torch.rand(n, generator=generator) < 0.8
            x[keep, t + 1] = follow[x[keep, t]]
        return x[:, :-1], x[:, 1:]

    return batches(seed, make, torch.float32)


def images(seed: int, dtype: torch.dtype, n: int = 16, side: int = 12) -> Callable[[int], tuple]:
    """Stripes, of four directions, in noise."""

    def make(generator: torch.Generator) -> tuple:
        y = torch.randint(4, (n,), generator=generator)
        i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        stripes = torch.stack([torch.sin(1.5 * i), torch.sin(1.5 * j), torch.sin(i + j), torch.sin(i - j + 0.0)])
        return (stripes[y] + 0.5 * torch.randn(n, side, side, generator=generator)).unsqueeze(1), y

    return batches(seed, make, dtype)


def classify(model: nn.Module, data: Callable[[int], tuple], reduction: str = "mean") -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        x, y = data(step)
        return F.cross_entropy(model(x).flatten(0, -2).float(), y.flatten(), reduction=reduction)

    return loss


def trial(model: nn.Module, dtype: torch.dtype, loss: Callable[[nn.Module], Callable[[int], Tensor]], **how) -> Trial:
    model = model.to(dtype)
    return Trial(model, loss(model), **how)


def mlp(
    width: int, depth: int, activation: Callable[[], nn.Module], inputs: int = 16, outputs: int = 4
) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def he(model: nn.Module, gain: float = 1.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.data.mul_(gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, rezero: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.alpha = nn.Parameter(torch.zeros(1)) if rezero else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + (y if self.alpha is None else self.alpha * y)


class Recurrent(nn.Module):
    def __init__(self, kind: type, width: int, layers: int = 1, vocabulary: int = 40, **how) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, layers, batch_first=True, **how)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


class Attention(nn.Module):
    """Separate projections: the key's bias gets a gradient that is rounding noise (softmax ignores it)."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """GPT-2's form: pre-norm, small normal initialisation, output tied to the embedding where asked for."""

    def __init__(self, width: int, depth: int, tied: bool, vocabulary: int = 40, length: int = 24) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        blocks = []
        for _ in range(depth):
            blocks.append(Residual(nn.Sequential(nn.LayerNorm(width), Attention(width))))
            feed = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            blocks.append(Residual(feed))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, norm_first: bool, vocabulary: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Experts(nn.Module):
    """Each input goes to one of the experts; some of them see nothing in a step."""

    def __init__(self, width: int, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.experts = nn.ModuleList(mlp(width, 1, nn.ReLU) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        noise = -torch.empty_like(logits).exponential_().log()  # Gumbel: every expert has its turn
        gate = logits.softmax(-1)
        chosen = (logits + noise).argmax(-1)
        share = gate[torch.arange(len(x)), chosen]
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return y[torch.arange(len(x)), chosen] * share.unsqueeze(-1)


class Bag(nn.Module):
    """Few of many words in a step: nearly all rows of the embedding have a gradient of zero."""

    def __init__(self, width: int, vocabulary: int = 5000) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, width)
        self.net = mlp(width, 1, nn.ReLU, inputs=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words(x))


class Factors(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(500, width), nn.Embedding(800, width)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return (self.user(u) * self.item(i)).sum(-1) + self.bias


# ---- healthy


def relu_mlp(seed: int, size: int, dtype: torch.dtype, **how) -> Trial:
    data = vectors(seed, dtype)
    return trial(mlp(32 * size, 3, nn.ReLU), dtype, lambda m: classify(m, data), max_norm=1.0, **how)


def tanh_mlp(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = mlp(32 * size, 6, nn.Tanh)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, nn.init.calculate_gain("tanh"))
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), max_norm=2.0)


def sgd_mlp(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(
        he(mlp(64 * size, 4, nn.ReLU)),
        dtype,
        lambda m: classify(m, vectors(seed, dtype)),
        lr=0.05,
        optimizer=torch.optim.SGD,
    )


def summed_loss(seed: int, size: int, dtype: torch.dtype) -> Trial:
    data = vectors(seed, dtype, n=256)
    return trial(mlp(32 * size, 2, nn.ReLU), dtype, lambda m: classify(m, data, "sum"))


def lstm(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Recurrent(nn.LSTM, 16 * size, 2), dtype, lambda m: classify(m, tokens(seed)), max_norm=0.5, lr=1e-2)


def gru(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Recurrent(nn.GRU, 16 * size), dtype, lambda m: classify(m, tokens(seed)), max_norm=0.5, lr=1e-2)


def plain_rnn(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = Recurrent(nn.RNN, 16 * size)
    nn.init.orthogonal_(model.rnn.weight_hh_l0)
    return trial(model, dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0)


def cnn(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = nn.Sequential(
        nn.Conv2d(1, 8 * size, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8 * size, 16 * size, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16 * size, 4),
    )  # fmt: skip
    return trial(model, dtype, lambda m: classify(m, images(seed, dtype)), lr=3e-3)


def resnet(seed: int, size: int, dtype: torch.dtype) -> Trial:
    w = 8 * size

    def block() -> nn.Module:
        conv = [nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
        return Residual(nn.Sequential(*conv, nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)))

    stem = [nn.Conv2d(1, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU()]
    body = [m for _ in range(4) for m in (block(), nn.ReLU())]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 4))
    return trial(model, dtype, lambda m: classify(m, images(seed, dtype)), max_norm=2.0, lr=3e-3)


def layernorm_residual(seed: int, size: int, dtype: torch.dtype) -> Trial:
    w = 32 * size
    blocks = [
        Residual(nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 2 * w), nn.GELU(), nn.Linear(2 * w, w))) for _ in range(6)
    ]
    model = nn.Sequential(nn.Linear(16, w), *blocks, nn.LayerNorm(w), nn.Linear(w, 4))
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), max_norm=2.0)


def encoder(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Encoder(16 * size, 3, True), dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0)


def post_norm_encoder(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = Encoder(16 * size, 4, False)
    return trial(model, dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0, warm_up=20)


def decoder(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Decoder(16 * size, 4, False), dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0)


def tied_decoder(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Decoder(16 * size, 2, True), dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0, lr=3e-3)


def autoencoder(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = nn.Sequential(nn.Flatten(), mlp(16 * size, 3, nn.ReLU, 144, 144), nn.Sigmoid())
    data = images(seed, dtype)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        return lambda step: F.mse_loss(m(data(step)[0]).float(), data(step)[0].flatten(1).float().sigmoid())

    return trial(model, dtype, loss)


def rezero(seed: int, size: int, dtype: torch.dtype) -> Trial:
    w = 32 * size
    blocks = [Residual(nn.Sequential(nn.Linear(w, w), nn.ReLU()), rezero=True) for _ in range(6)]
    model = nn.Sequential(nn.Linear(16, w), *blocks, nn.Linear(w, 4))
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), lr=3e-3)


def lora(seed: int, size: int, dtype: torch.dtype) -> Trial:
    w = 32 * size
    model = nn.Sequential(Lora(nn.Linear(16, w)), nn.ReLU(), Lora(nn.Linear(w, w)), nn.ReLU(), Lora(nn.Linear(w, 4)))
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), lr=3e-3)


def zero_head(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = mlp(32 * size, 3, nn.GELU)
    nn.init.zeros_(model[-1].weight)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


def experts(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Experts(16 * size), dtype, lambda m: classify(m, vectors(seed, dtype, n=16)), lr=3e-3)


def bag_of_words(seed: int, size: int, dtype: torch.dtype) -> Trial:
    label = torch.randint(4, (5000,), generator=torch.Generator().manual_seed(seed))

    def make(generator: torch.Generator) -> tuple:
        y = torch.randint(4, (16,), generator=generator)
        x = torch.randint(5000, (16, 12), generator=generator)
        x[:, 0] = y  # tells the label
        return x, label[:4][y]

    return trial(Bag(16 * size), dtype, lambda m: classify(m, batches(seed, make, dtype)), lr=1e-2)


def one_hot_inputs(seed: int, size: int, dtype: torch.dtype) -> Trial:
    def make(generator: torch.Generator) -> tuple:
        x = torch.randint(2000, (16,), generator=generator)
        return F.one_hot(x, 2000).float(), x % 4

    model = mlp(32 * size, 2, nn.ReLU, inputs=2000)
    return trial(model, dtype, lambda m: classify(m, batches(seed, make, dtype)), lr=3e-3)


def factorisation(seed: int, size: int, dtype: torch.dtype) -> Trial:
    def make(generator: torch.Generator) -> tuple:
        u, i = torch.randint(500, (32,), generator=generator), torch.randint(800, (32,), generator=generator)
        return u, i, ((u + i) % 5).float()

    data = batches(seed, make, torch.float32)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        def at(step: int) -> Tensor:
            u, i, y = data(step)
            return F.mse_loss(m(u, i).float(), y)

        return at

    return trial(Factors(8 * size), dtype, loss, lr=1e-2)


def converging(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """The loss goes to nothing and takes all gradients with it."""
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        return lambda step: F.mse_loss(m(x).float(), x.float() @ teacher)

    model = nn.Sequential(nn.Linear(16, 8 * size), nn.Linear(8 * size, 4))
    return trial(model, dtype, loss, lr=0.1, optimizer=torch.optim.SGD, max_norm=2.0, steps=200)


def overfitting(seed: int, size: int, dtype: torch.dtype) -> Trial:
    fixed = vectors(seed, dtype, n=16)(0)
    model = mlp(32 * size, 3, nn.ReLU)
    return trial(model, dtype, lambda m: classify(m, lambda step: fixed), lr=1e-2, max_norm=1.0, steps=150)


def policy_gradient(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """REINFORCE with batches of eight: the noisiest gradients here."""
    data = vectors(seed, dtype, n=8)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        def at(step: int) -> Tensor:
            x, y = data(step)
            logits = m(x).float()
            action = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(step))
            reward = (action[:, 0] == y).float() - 0.25
            return (F.cross_entropy(logits, action[:, 0], reduction="none") * reward).mean()

        return at

    return trial(mlp(32 * size, 2, nn.Tanh), dtype, loss, max_norm=0.5, lr=3e-3, steps=80)


HEALTHY: dict[str, Build] = {
    f.__name__: f
    for f in (
        relu_mlp, tanh_mlp, sgd_mlp, summed_loss, lstm, gru, plain_rnn, cnn, resnet, layernorm_residual, encoder,
        post_norm_encoder, decoder, tied_decoder, autoencoder, rezero, lora, zero_head, experts, bag_of_words,
        one_hot_inputs, factorisation, converging, overfitting, policy_gradient,
    )
}  # fmt: skip


# ---- planted faults


@dataclass
class Fault:
    build: Build
    kind: str
    layer: str  # "": any, or the whole model


def init_(model: nn.Module, std: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=std)
    return model


def sigmoid_stack(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """Twelve sigmoid layers with weights of 0.01."""
    model = init_(mlp(32 * size, 12, nn.Sigmoid), 0.01)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


def default_sigmoid_stack(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """Eight sigmoid layers as torch initialises them: a quarter of the gradient at most passes each."""
    return trial(mlp(32 * size, 8, nn.Sigmoid), dtype, lambda m: classify(m, vectors(seed, dtype)))


def small_relu_stack(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """With SGD: Adam, whose steps are as large as these weights, grows out of it at large widths."""
    model = init_(mlp(32 * size, 8, nn.ReLU), 0.02 / size**0.5)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), max_norm=1.0, optimizer=torch.optim.SGD)


def small_cnn(seed: int, size: int, dtype: torch.dtype) -> Trial:
    w = 8 * size
    convs = [m for i in range(8) for m in (nn.Conv2d(w if i else 1, w, 3, padding=1), nn.Tanh())]
    model = init_(nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 4)), 0.02 / size**0.5)
    return trial(model, dtype, lambda m: classify(m, images(seed, dtype)), optimizer=torch.optim.SGD)


def saturated_sigmoids(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """Biases that hold all sigmoids near 0, where their slope is nothing."""
    model = mlp(32 * size, 4, nn.Sigmoid)
    for module in model[:-1]:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, -8)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


def half_underflow(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """float16 without loss scaling and a small loss."""
    data = vectors(seed, torch.float16)
    return trial(
        mlp(32 * size, 3, nn.ReLU),
        torch.float16,
        lambda m: lambda step: classify(m, data)(step) * 1e-5,
        optimizer=torch.optim.SGD,
    )


def exploding_rnn(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = Recurrent(nn.RNN, 16 * size)
    model.rnn.weight_hh_l0.data.mul_(10)
    return trial(model, dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0)


def exploding_relu_rnn(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = Recurrent(nn.RNN, 16 * size, nonlinearity="relu")
    nn.init.orthogonal_(model.rnn.weight_hh_l0, 2.5)
    return trial(model, dtype, lambda m: classify(m, tokens(seed)), max_norm=1.0)


def exploding_lstm(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = Recurrent(nn.LSTM, 16 * size)
    model.rnn.weight_hh_l0.data.mul_(10)
    return trial(model, dtype, lambda m: classify(m, tokens(seed, length=60)), max_norm=1.0)


def large_init(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = he(mlp(32 * size, 8, nn.ReLU), 4.0)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)), max_norm=1.0)


def large_rate(seed: int, size: int, dtype: torch.dtype) -> Trial:
    """Gradient descent beyond the stable learning rate: a regression runs away."""
    teacher = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    data = vectors(seed, dtype)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        return lambda step: F.mse_loss(m(data(step)[0]).float(), data(step)[0].float() @ teacher)

    return trial(nn.Sequential(nn.Linear(16, 4)), dtype, loss, lr=6.0, optimizer=torch.optim.SGD, steps=30)


def dead_relu(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = mlp(32 * size, 5, nn.ReLU)
    model[4].bias.data.fill_(-100)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


def dying_units(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = mlp(32 * size, 3, nn.ReLU)
    model[2].bias.data[2:].fill_(-100)
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


class Unused(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.main, self.extra = mlp(width, 2, nn.ReLU), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + 0 * self.extra(x)


def unused_branch(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return trial(Unused(32 * size), dtype, lambda m: classify(m, vectors(seed, dtype)))


def bad_batch(seed: int, size: int, dtype: torch.dtype) -> Trial:
    data = vectors(seed, dtype)
    scale = lambda step: 300.0 if step == 25 else 1.0  # noqa: E731
    return trial(
        he(mlp(32 * size, 3, nn.ReLU)),
        dtype,
        lambda m: classify(m, lambda step: (data(step)[0] * scale(step), data(step)[1])),
    )


def layer_spike(seed: int, size: int, dtype: torch.dtype) -> Trial:
    def plant(step: int, model: nn.Module) -> None:
        if step == 30:
            model[2].weight.grad.mul_(1000)

    return relu_mlp(seed, size, dtype, plant=plant)


def low_threshold(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return replace(lstm(seed, size, dtype), max_norm=1e-3)


def high_threshold(seed: int, size: int, dtype: torch.dtype) -> Trial:
    return replace(encoder(seed, size, dtype), max_norm=1e3)


def log_of_zero(seed: int, size: int, dtype: torch.dtype) -> Trial:
    data = vectors(seed, dtype)

    def loss(m: nn.Module) -> Callable[[int], Tensor]:
        def at(step: int) -> Tensor:
            p = m(data(step)[0]).float().softmax(-1)
            return -(p * (1.0 if step != 20 else 0.0)).log().mean()

        return at

    return trial(mlp(32 * size, 2, nn.ReLU), dtype, loss)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * (x > 0)).sqrt()


def root_of_zero(seed: int, size: int, dtype: torch.dtype) -> Trial:
    model = mlp(32 * size, 3, nn.ReLU)
    model[3] = Root()
    return trial(model, dtype, lambda m: classify(m, vectors(seed, dtype)))


def infinite_layer(seed: int, size: int, dtype: torch.dtype) -> Trial:
    def plant(step: int, model: nn.Module) -> None:
        if step == 12:
            model[4].weight.grad[0, 0] = float("inf")

    return relu_mlp(seed, size, dtype, plant=plant)


FAULTS: dict[str, Fault] = {
    "sigmoid_stack": Fault(sigmoid_stack, "vanishing", "0.weight"),
    "default_sigmoid_stack": Fault(default_sigmoid_stack, "vanishing", "0.weight"),
    "small_relu_stack": Fault(small_relu_stack, "vanishing", "0.weight"),
    "small_cnn": Fault(small_cnn, "vanishing", "0.weight"),
    "saturated_sigmoids": Fault(saturated_sigmoids, "vanishing", "0.weight"),
    "half_underflow": Fault(half_underflow, "vanishing", "0.weight"),
    "exploding_rnn": Fault(exploding_rnn, "exploding", "rnn.weight_hh_l0"),
    "exploding_relu_rnn": Fault(exploding_relu_rnn, "exploding", "rnn.weight_hh_l0"),
    "exploding_lstm": Fault(exploding_lstm, "exploding", "rnn.weight_hh_l0"),
    "large_init": Fault(large_init, "exploding", ""),
    "large_rate": Fault(large_rate, "exploding", "0.weight"),
    "dead_relu": Fault(dead_relu, "dead", "4.weight"),
    "dying_units": Fault(dying_units, "dead", "2.weight"),
    "unused_branch": Fault(unused_branch, "dead", "extra.weight"),
    "bad_batch": Fault(bad_batch, "spike", ""),
    "layer_spike": Fault(layer_spike, "spike", "2.weight"),
    "low_threshold": Fault(low_threshold, "always-clipped", ""),
    "high_threshold": Fault(high_threshold, "never-clipped", ""),
    "log_of_zero": Fault(log_of_zero, "non-finite", ""),
    "root_of_zero": Fault(root_of_zero, "non-finite", "2.weight"),
    "infinite_layer": Fault(infinite_layer, "non-finite", "4.weight"),
}
