"""Small models of PyTorch and Keras, whose weights, gradients and training ours are tested against.

RUN[framework](name) returns, in float64, a model's parameters at the start, after K and after 2 K
steps on the same batch; the checkpoint of its RMSProp after K; its outputs and gradients at the
start; and its running statistics, which differ from their initial values. All random numbers come
from a fixed NumPy seed.

cnn       a convolution, batch norm, and a linear layer on the flattened image, not square
sequence  an embedding, layer norm, two layers of LSTM and a linear layer
gru       as sequence, with two layers of GRU
attention an embedding, two layers of attention, with and without biases, and a linear layer
volume    a convolution in 3 dimensions, group norm, a convolution in 1 dimension

Keras computes means and matrix products in float32 here, so its results are only as accurate.
"""

import numpy as np

import frameworks

K = 4
NAMES = ("cnn", "sequence", "volume", "gru", "attention")
OF_WORDS = ("gru", "attention")  # which have the batch of "sequence"
OPTIONS = {
    "cnn": {"momentum": 0.9, "centered": True},
    "sequence": {"momentum": 0.9},
    "volume": {"centered": True},
    "gru": {"momentum": 0.9, "centered": True},
    "attention": {"momentum": 0.9},
}
# The gradient of a key's bias is rounding alone: it must not be divided by its own size.
EPS = {"attention": 1e-3}
IMAGE, KERNEL = (5, 6, 3), (3, 2)  # height, width, channels; height, width
FLAT = (3, 5, 4)  # what is flattened
HEADS, SIZE = 2, 3  # of attention


def options(framework, name):
    """What a framework's RMSProp is given, but for the learning rate and the decay."""
    eps = {"pytorch": "eps", "keras": "epsilon"}[framework]
    return OPTIONS[name] | ({eps: EPS[name]} if name in EPS else {})


def batch(name):
    """Inputs as Flax and Keras have them, and the outputs that are wanted."""
    name = "sequence" if name in OF_WORDS else name
    rng = np.random.default_rng(4)
    x = {
        "cnn": rng.standard_normal((4, *IMAGE)),
        "sequence": rng.integers(0, 7, (4, 5)),
        "volume": rng.standard_normal((2, 3, 4, 7, 2)),
    }[name]
    return x, rng.standard_normal((len(x), {"cnn": 3, "sequence": 2, "volume": 3}[name]))


def values(shapes):
    """Numbers for arrays of these shapes, {name: shape}; positive ones for variances."""
    rng = np.random.default_rng(5)
    found = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: np.abs(v) + 0.5 if "var" in name else v for name, v in found.items()}


def _pytorch_run(name):
    import torch

    model = _pytorch_model(name).double()
    start = values({n: tuple(p.shape) for n, p in model.named_parameters()})
    stats = values({n: tuple(b.shape) for n, b in model.named_buffers() if b.is_floating_point()})
    model.load_state_dict({n: torch.tensor(a) for n, a in (start | stats).items()}, strict=False)
    x, y = batch(name)
    x, y = torch.tensor(np.moveaxis(x, -1, 1) if x.ndim > 2 else x), torch.tensor(y)
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=0.01, alpha=0.9, **options("pytorch", name)
    )
    outputs = model.eval()(x).detach().numpy()
    model.train()
    found = []
    for t in range(2 * K):
        optimizer.zero_grad()
        torch.mean((model(x) - y) ** 2).backward()
        if t == 0:
            gradients = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        optimizer.step()
        if t + 1 in (K, 2 * K):
            saved = optimizer.state_dict()
            state = {
                number: {slot: tensor.numpy().copy() for slot, tensor in slots.items()}
                for number, slots in saved["state"].items()
            }
            params = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
            found.append((params, saved | {"state": state}))
    return _record(start, stats, outputs, gradients, found)


def _pytorch_model(name):
    from torch import nn

    class Cnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(IMAGE[-1], FLAT[-1], KERNEL, bias=False)
            self.norm = nn.BatchNorm2d(FLAT[-1])
            self.fc = nn.Linear(int(np.prod(FLAT)), 3)

        def forward(self, x):
            return self.fc(self.norm(self.conv(x)).relu().flatten(1))

    class Sequence(nn.Module):
        def __init__(self, kind="lstm"):
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.norm = nn.LayerNorm(3)
            layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](3, 4, num_layers=2, batch_first=True)
            self.kind = kind
            self.add_module(kind, layer)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.norm(self.embed(x))
            return self.fc(getattr(self, self.kind)(x)[0][:, -1])

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 4, (1, 2, 3))
            self.norm = nn.GroupNorm(2, 4)
            self.line = nn.Conv1d(4, 3, 2, bias=False)

        def forward(self, x):
            return self.line(self.norm(self.conv(x)).relu().mean((2, 3))).mean(2)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            features = HEADS * SIZE
            self.embed = nn.Embedding(7, features)
            self.first = nn.MultiheadAttention(features, HEADS, batch_first=True)
            self.second = nn.MultiheadAttention(features, HEADS, bias=False, batch_first=True)
            self.fc = nn.Linear(features, 2)

        def forward(self, x):
            x = self.embed(x)
            x = self.first(x, x, x, need_weights=False)[0]
            return self.fc(self.second(x, x, x, need_weights=False)[0].mean(1))

    if name == "gru":
        return Sequence("gru")
    return {"cnn": Cnn, "sequence": Sequence, "volume": Volume, "attention": Attention}[name]()


def _keras_run(name):
    keras = frameworks.import_keras(np.dtype(np.float64))
    import jax
    import jax.numpy as jnp

    model = _keras_model(keras, name)
    weights = model.trainable_variables
    rest = [v for v in model.non_trainable_variables if "moving" in v.path]
    start, stats = (values({v.path: v.shape for v in some}) for some in (weights, rest))
    for variable in [*weights, *rest]:
        variable.assign((start | stats)[variable.path])
    x, y = batch(name)
    optimizer = keras.optimizers.RMSprop(0.01, rho=0.9, **options("keras", name))
    optimizer.build(weights)
    outputs = np.asarray(model(x, training=False))

    @jax.jit
    @jax.grad
    def gradient(values):
        others = [v.value for v in model.non_trainable_variables]
        output, _ = model.stateless_call(values, others, x, training=True)
        return jnp.mean((output - y) ** 2)

    found = []
    for t in range(2 * K):
        g = gradient([v.value for v in weights])
        if t == 0:
            gradients = {v.path: np.asarray(a) for v, a in zip(weights, g, strict=True)}
        optimizer.apply(g, weights)
        if t + 1 in (K, 2 * K):
            params = {v.path: np.array(v) for v in weights}
            found.append((params, [np.array(v) for v in optimizer.variables]))
    return _record(start, stats, outputs, gradients, found)


def _keras_model(keras, name):
    layers = keras.layers
    if name == "cnn":
        return keras.Sequential(
            [
                keras.Input(IMAGE),
                layers.Conv2D(FLAT[-1], KERNEL, use_bias=False, name="conv"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(3, name="fc"),
            ],
            name="net",
        )
    if name in ("sequence", "gru"):
        layer, kind = (layers.LSTM, "lstm") if name == "sequence" else (layers.GRU, "gru")
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int64"),
                layers.Embedding(7, 3, name="embed"),
                layers.LayerNormalization(name="norm"),
                layer(4, return_sequences=True, name=kind),
                layer(4, name=f"{kind}_1"),
                layers.Dense(2, name="fc"),
            ],
            name="net",
        )
    if name == "attention":
        inputs = keras.Input((5,), dtype="int64")
        x = layers.Embedding(7, HEADS * SIZE, name="embed")(inputs)
        x = layers.MultiHeadAttention(HEADS, SIZE, name="first")(x, x)
        x = layers.MultiHeadAttention(HEADS, SIZE, use_bias=False, name="second")(x, x)
        return keras.Model(inputs, layers.Dense(2, name="fc")(keras.ops.mean(x, 1)), name="net")
    x = inputs = keras.Input((3, 4, 7, 2))
    x = layers.Conv3D(4, (1, 2, 3), name="conv")(x)
    x = layers.GroupNormalization(2, name="norm")(x)
    x = keras.ops.mean(layers.ReLU()(x), (1, 2))
    x = layers.Conv1D(3, 2, use_bias=False, name="line")(x)
    return keras.Model(inputs, keras.ops.mean(x, 1), name="net")


def _record(start, stats, outputs, gradients, found):
    (params, checkpoint), (final, _) = found
    return {
        "start": start,
        "stats": stats,
        "outputs": outputs,
        "gradients": gradients,
        "params": params,
        "checkpoint": checkpoint,
        "final": final,
    }


RUN = {"pytorch": _pytorch_run, "keras": _keras_run}
