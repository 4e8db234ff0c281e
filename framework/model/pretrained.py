"""A causal language model of transformers in the place of our own: its layers and weights, our losses and heads."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...parallel.span import Span
from ..hf import adapt, hidden_states, logits, random_settings, set_recompute
from .config import ModelConfig
from .directory import directory_of, quietly, read_config
from .heads import IGNORED, Head, labelled, make_head, slabs, token_losses
from .sequence import SequenceModel
from .trained import add_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_wanted: ContextVar[Tensor | None] = ContextVar("wanted", default=None)  # labels: the output layer answers with losses


class PretrainedHead(Head):
    """The next token, by the model's own output layer and whatever its forward does around it.

    With labels it returns each token's loss, without the logits of all tokens in memory.
    """

    metrics = ("accuracy",)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = [model]  # in a list: its parameters are those of `Pretrained.model`
        self._scale: float | None = None
        output = model.get_output_embeddings()
        if type(output) is nn.Linear and output.bias is None:
            _answer_losses(output)
            self._scale = _scale_of(model, output)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[B, L, D]`` (or ``[B, D]``) -> logits ``[..., vocab]``, or with ``labels [B, L]`` the negative
        log-likelihoods ``[B, L]`` in nats.
        """
        model = self._model[0]
        if labels is None:
            return logits(model, x) if x.dim() == 3 else logits(model, x.unsqueeze(0)).squeeze(0)
        rows, ids = x.flatten(0, 1), labels.flatten()
        if self._scale is not None:
            token = _wanted.set(ids)
            try:
                losses: Tensor = model.get_output_embeddings()(rows * self._scale)
            finally:
                _wanted.reset(token)
            return losses.view(labels.shape)
        weight = model.get_output_embeddings().weight
        parts = [
            checkpoint(self._losses, rows[some], ids[some], use_reentrant=False, preserve_rng_state=False)
            for some in slabs(rows, weight)
        ]
        return torch.cat(parts).view(labels.shape) if parts else rows.sum(-1).view(labels.shape)

    def measure(self, x: Tensor, labels: Tensor) -> Tensor:
        known = labelled(labels)
        right = torch.zeros(labels.shape, dtype=torch.float32, device=x.device)
        rows, ids = x[known], labels[known]
        weight = self._model[0].get_output_embeddings().weight
        hits = [(self(rows[some]).argmax(-1) == ids[some]).float() for some in slabs(rows, weight)]
        right[known] = torch.cat(hits) if hits else right.new_zeros(0)
        return right.unsqueeze(-1)

    def _losses(self, rows: Tensor, ids: Tensor) -> Tensor:
        found = self(rows)
        wide = found.to(torch.promote_types(found.dtype, torch.float32))
        return F.cross_entropy(wide, ids, ignore_index=IGNORED, reduction="none")


def _answer_losses(output: nn.Linear) -> None:
    """Let the output layer compute losses, while it runs as a module: then ZeRO 3 has gathered its weight."""
    original: Callable[..., Tensor] = type(output).forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        labels = _wanted.get()
        return original(self, x) if labels is None else token_losses(x, self.weight, labels)

    output.forward = types.MethodType(forward, output)  # type: ignore[method-assign]


@torch.no_grad()
def _scale_of(model: PreTrainedModel, output: nn.Linear) -> float | None:
    """The number s by which logits are ``s x W^T``, or None where they are something else, such as capped."""
    if output.weight.is_meta:
        return None
    weight = output.weight.float()
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).view(3, -1).sin()
    plain = x @ weight.t()
    x = x * (100 / plain.abs().max().clamp(min=1e-30))  # so large that a cap would show
    plain = x @ weight.t()
    found = logits(model, x.to(output.weight.dtype).unsqueeze(0))[0].float()
    scale = float((plain * found).sum() / plain.square().sum())
    rounding = 8 * torch.finfo(output.weight.dtype).eps
    return scale if bool((found - scale * plain).abs().max() <= rounding * found.abs().max()) else None


class Pretrained(SequenceModel):
    """A causal language model of transformers that takes a `Span`.

    Attributes:
        model: the adapted model; its parameters have their own names under ``model.``.
    """

    def __init__(self, config: ModelConfig, model: PreTrainedModel) -> None:
        super().__init__()
        self.config, self.model = config, adapt(model)
        if config.head == "token":
            self.head: Head = PretrainedHead(model)
        else:
            self.head = make_head(config.head, config.width, config.outputs, config.documents)

    def features(self, tokens: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        set_recompute(self.model, self.recompute)
        x = hidden_states(self.model, tokens, span)
        return self.head.collect(x, span), x.new_zeros(())


def load(config: ModelConfig) -> Pretrained:
    """The model in ``config.pretrained``, or one with new weights as ``config.architecture`` describes it, in fp32; on
    the meta device, no weights are read.

    Raises:
        InputError: the directory holds no model of transformers, or one that cannot be adapted.
    """
    shape = read_config(config)
    from transformers import AutoModelForCausalLM

    for name in random_settings(shape.get_text_config()):
        log.info("%s of the model's configuration is set to 0: every rank would draw its own", name)
        setattr(shape.get_text_config(), name, 0.0)
    if config.pretrained and torch.get_default_device().type != "meta":
        model = _read(config, shape)
    else:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    if config.lora.rank:
        add_adapters(model, config.lora)
    with quietly():
        return Pretrained(config, model)


def _read(config: ModelConfig, shape: Any) -> PreTrainedModel:
    """The model in ``config.pretrained`` with its weights; InputError if some are missing or cannot be read."""
    from transformers import AutoModelForCausalLM

    place = directory_of(config)
    try:
        with quietly():
            model, found = AutoModelForCausalLM.from_pretrained(
                place, config=shape, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever the files' readers stumble over
        why = (str(error).splitlines() or [""])[0]
        raise InputError("model.pretrained", str(place), f"its weights cannot be read: {why}") from None
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:3])
        allowed = (
            f"has not all weights of its {type(model).__name__}: {len(found['missing_keys'])} are missing, {names}"
        )
        raise InputError("model.pretrained", str(place), allowed)
    return model
