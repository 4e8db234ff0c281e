"""Models: our own, and causal language models of transformers in their place."""

from __future__ import annotations

from .config import ModelConfig
from .directory import directory_of
from .heads import IGNORED
from .ours import Block, Model
from .pretrained import Pretrained, load
from .sequence import SequenceModel

__all__ = ["IGNORED", "Block", "Model", "ModelConfig", "Pretrained", "SequenceModel", "build_model"]


def build_model(config: ModelConfig) -> SequenceModel:
    """The model that ``config`` describes, on the current default device, with weights drawn from torch's global seed;
    those of ``config.pretrained`` are read.

    Raises:
        InputError: a size or name that does not fit.
    """
    return Model(config) if directory_of(config) is None else load(config)
