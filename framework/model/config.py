"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...bounds import bounded
from ..mixers import (
    ChelaConfig,
    ElementwiseConfig,
    FeedforwardKernelConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    SoftmaxConfig,
)
from .trained import LoraConfig


@dataclass
class ModelConfig:
    """The shape of the model.

    Attributes:
        vocab: tokens in the vocabulary; 0 to take it from the data.
        width: D, channels of the residual stream.
        depth: number of layers (residual blocks), each a mixer and a feed-forward layer.
        mixers: token mixers by name, of the first, second, ... layer; the list is repeated over the depth.
        causal: whether tokens see only themselves and earlier ones.
        ffn_ratio: hidden width of the feed-forward layers, divided by ``width``.
        dropout: rate at the end of each mixer and feed-forward layer.
        positions: position encoding that is added to the embedded tokens: "sinusoidal" (arXiv 1706.03762), or "none".
        channels: C, where a token is a vector of C numbers; 0 where tokens are ids.
        head: the output: the next "token"; a "class" or "numbers" for the whole sequence; numbers for each token
            ("series").
        outputs: how many classes or numbers the head answers; 0 to take it from the data.
        documents: 2 where a sequence is two documents to be compared, else 1.
        elementwise, chela, feedforward_kernel, mamba2, gated_deltanet, softmax: the mixers' options.
        code: Python files, run by `config.load`, that register mixers of your own; `build_model` runs none.
        options: the options of these mixers, by name.
        init_from: a run or an export from which a new run takes all weights that fit by name and shape.
        pretrained: directory of a model of transformers, in place of our own: its shape, weights and tokenizer.
        architecture: the same without the weights, which are drawn from ``run.seed``.
        lora: adapters of such a model.
    """

    vocab: int = bounded(0, minimum=0)
    width: int = bounded(128, minimum=1)
    depth: int = bounded(4, minimum=1)
    mixers: list[str] = field(default_factory=lambda: ["elementwise", "chela"])
    causal: bool = True
    ffn_ratio: float = 8 / 3
    dropout: float = bounded(0.0, minimum=0)
    positions: Literal["none", "sinusoidal"] = "none"
    channels: int = bounded(0, minimum=0)
    head: Literal["token", "class", "numbers", "series"] = "token"
    outputs: int = bounded(0, minimum=0)
    documents: int = 1
    elementwise: ElementwiseConfig = field(default_factory=ElementwiseConfig)
    chela: ChelaConfig = field(default_factory=ChelaConfig)
    feedforward_kernel: FeedforwardKernelConfig = field(default_factory=FeedforwardKernelConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    gated_deltanet: GatedDeltaNetConfig = field(default_factory=GatedDeltaNetConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    code: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""
    pretrained: str = ""
    architecture: str = ""
    lora: LoraConfig = field(default_factory=LoraConfig)
