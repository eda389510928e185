"""The shapes of the parameters of five networks, counted as their papers build them.

    python benchmarks/trees.py    # prints the leaves, shapes and parameters of each

He, Zhang, Ren and Sun, arXiv:1512.03385 (ResNet-50); Tan and Le, arXiv:1905.11946
(EfficientNet-B7); Dosovitskiy and others, arXiv:2010.11929 (ViT-B/16); Radford and others,
"Language models are unsupervised multitask learners", 2019 (GPT-2, the smallest). Kernels are laid
out as in Flax, with outputs last. Touvron and others, arXiv:2302.13971 (Llama, the smallest), is
used only in calculations.
"""

from collections.abc import Iterator
from itertools import chain
import math

Shape = tuple[int, ...]
Shapes = list[Shape]


def conv(size: int, inputs: int, outputs: int) -> Shapes:
    """A convolution without bias, and the scale and bias of its batch norm."""
    return [(size, size, inputs, outputs), (outputs,), (outputs,)]


def dense(inputs: int, outputs: int) -> Shapes:
    return [(inputs, outputs), (outputs,)]


def resnet50() -> Shapes:
    def stages() -> Iterator[Shapes]:
        inputs = 64
        for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
            for block in range(blocks):
                yield conv(1, inputs, width) + conv(3, width, width) + conv(1, width, 4 * width)
                if block == 0:
                    yield conv(1, inputs, 4 * width)  # the shortcut
                inputs = 4 * width

    return [*conv(7, 3, 64), *chain(*stages()), *dense(2048, 1000)]


def efficientnet_b7() -> Shapes:
    """2.0 times as wide and 3.1 times as deep as EfficientNet-B0."""

    def wide(channels: int) -> int:
        return 2 * channels  # a multiple of 8 in every stage

    def stages() -> Iterator[Shapes]:
        inputs = wide(32)
        for expand, channels, blocks, size in (
            (1, 16, 1, 3),
            (6, 24, 2, 3),
            (6, 40, 2, 5),
            (6, 80, 3, 3),
            (6, 112, 3, 5),
            (6, 192, 4, 5),
            (6, 320, 1, 3),
        ):
            for _ in range(math.ceil(3.1 * blocks)):
                hidden, squeezed = expand * inputs, inputs // 4
                if expand > 1:
                    yield conv(1, inputs, hidden)
                yield conv(size, 1, hidden)  # one kernel per channel
                yield [(1, 1, hidden, squeezed), (squeezed,)]
                yield [(1, 1, squeezed, hidden), (hidden,)]
                inputs = wide(channels)
                yield conv(1, hidden, inputs)

    last = wide(1280)
    head = conv(1, wide(320), last) + dense(last, 1000)
    return [*conv(3, 3, wide(32)), *chain(*stages()), *head]


def transformer(layers: int, width: int) -> Shapes:
    """Layers of two norms, attention with one matrix for queries, keys and values, and an MLP."""
    norm = [(width,), (width,)]
    attention = dense(width, 3 * width) + dense(width, width)
    mlp = dense(width, 4 * width) + dense(4 * width, width)
    return layers * (norm + attention + norm + mlp) + norm


def vit_b16() -> Shapes:
    patches, positions = [(16, 16, 3, 768), (768,)], [(1, 1, 768), (1, 197, 768)]
    return [*patches, *positions, *transformer(12, 768), *dense(768, 1000)]


def gpt2() -> Shapes:
    return [(50257, 768), (1024, 768), *transformer(12, 768)]


def llama_7b() -> Shapes:
    """A transformer without biases; a norm has only a scale, and the MLP has a gate."""
    width, hidden, vocabulary = 4096, 11008, 32000
    attention, norms = 4 * [(width, width)], 2 * [(width,)]
    mlp = [(width, hidden), (width, hidden), (hidden, width)]
    return [(vocabulary, width), *(32 * (attention + mlp + norms)), (width,), (width, vocabulary)]


ONE_LEAF: Shapes = [(4096, 4096)]

TREES = {
    "ResNet-50": resnet50(),
    "EfficientNet-B7": efficientnet_b7(),
    "ViT-B/16": vit_b16(),
    "GPT-2": gpt2(),
}


def parameters(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


if __name__ == "__main__":
    for name, shapes in [*TREES.items(), ("Llama-7B", llama_7b())]:
        print(
            f"{name}: {len(shapes)} leaves of {len(set(shapes))} shapes, "
            f"{parameters(shapes):,} parameters"
        )
