"""The model as a class of Hugging Face's transformers, with `from_pretrained`, `generate` and `Trainer`.

Importing this module registers the model with the Auto classes, which then load the directories that ``longreach
export`` writes::

    import longreach.framework.inference.huggingface
    model = AutoModelForCausalLM.from_pretrained("exported")

The cache of transformers is a `Span` with a carry here; its size does not grow with the number of tokens read. No other
module imports this one, because transformers is an optional dependency.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.span import Span
from ..model import IGNORED, ModelConfig, build_model
from .loading import MODEL_TYPE, read_json_as

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Cache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    needs = "longreach.framework.inference.huggingface needs transformers: pip install 'longreach[hf]'"
    raise ModuleNotFoundError(needs, name="transformers") from None

EXPORT_KEYS = ("format", "step", "sha256")  # of an export's config.json; dropped, since the tensors may change now


class LongreachConfig(PreTrainedConfig):
    """The configuration of a model as a transformers configuration.

    Attributes:
        model: the keys of `ModelConfig`, plain values in nested dicts.

    Args:
        model: a `ModelConfig`, or some of its keys; missing ones have their defaults.
        kwargs: keys of every transformers configuration.

    Raises:
        InputError: an unknown key, or a value of another type.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    tie_word_embeddings = True

    def __init__(self, model: ModelConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = dataclasses.asdict(model) if isinstance(model, ModelConfig) else model or {}
        self.model = dataclasses.asdict(self.shape())
        super().__init__(**{key: value for key, value in kwargs.items() if key not in EXPORT_KEYS})

    def shape(self) -> ModelConfig:
        """`model` as the dataclass, with all types checked."""
        return read_json_as(json.dumps(self.model), ModelConfig, "model")

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        vocab: int = self.model["vocab"]
        return vocab

    @vocab_size.setter
    def vocab_size(self, vocab: int) -> None:
        self.model["vocab"] = vocab

    @property
    def hidden_size(self) -> int:
        """D, channels of the residual stream."""
        width: int = self.model["width"]
        return width

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        depth: int = self.model["depth"]
        return depth


class LongreachCache(Cache):
    """The carry of the tokens that a model has read; a forward pass that is given the cache updates it.

    To continue several times from the same tokens, use `copy.deepcopy`. The cache cannot be cropped.

    Attributes:
        span: of the next token, with the carry.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.span = Span(keep_carry=True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens read, padding included."""
        return self.span.start

    @property
    def batch_size(self) -> int:
        """B, rows; -1 while nothing was read."""
        return next((carry.state.shape[0] for carry in self.span.carry.values()), -1)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Replace row i by row ``indices[i]``, for all i."""

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, indices.to(x.device))

        carry = {
            key: Carry(chosen(state), None if segment is None else chosen(segment))
            for key, (state, segment) in self.span.carry.items()
        }
        self.span = self.span.with_carry(carry)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same as `batch_select_indices`; called by beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        if self.span.carry:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Discard the carry: the next token is the first of a text."""
        self.span = Span(keep_carry=True)

    @property
    def is_croppable(self) -> bool:
        """False: earlier states cannot be computed from a later one."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InputError: see `is_croppable`."""
        raise InputError(
            "tokens_to_remove", tokens_to_remove, "a carry cannot take tokens back", "copy.deepcopy it before"
        )


class LongreachForCausalLM(PreTrainedModel, GenerationMixin):
    """`Model` as a causal language model of transformers: on one device, for whole sequences or with a cache.

    Attributes:
        model: the `Model`.
    """

    config_class = LongreachConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True  # refuses decoding methods that crop the cache
    _keep_in_fp32_modules_strict = ("log_decay", "angle")  # powers of a modal kernel's rates amplify their rounding
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongreachConfig) -> None:
        super().__init__(config)
        shape = config.shape()
        if not shape.causal:
            raise InputError("model.causal", False, "only a causal model can continue a text")
        if shape.head != "token":
            raise InputError("model.head", shape.head, "token: only such a model can continue a text")
        self.model = build_model(shape)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, for the directories of transformers and of ``longreach export``.

        Raises:
            InputError: a tensor of the model is missing.
        """
        model, found = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(found["missing_keys"]):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError("model", str(path), f"lacks {missing[0]}{more}")
        return (model, found) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `build_model` has initialized the weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates the cache, not `generate`

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding; its weight is tied to the head's."""
        embedding = self.model.embedding
        assert isinstance(embedding, nn.Embedding)  # checked in the constructor: the head is ``token``
        return embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding and the tied weight of the head."""
        self.model.embedding, self.model.head.weight = value, value.weight
        self.model.config.vocab = value.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LongreachCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of each token.

        Args:
            input_ids: ``[B, L]`` int64.
            attention_mask: ``[B, T]``, 0 for padding; T = L, or T counts the tokens in the cache too. A row may be
                padded on the left, on the right or on both sides.
            past_key_values: the cache of earlier tokens; it is updated.
            labels: ``[B, L]`` int64, usually ``input_ids``: shifted here, so that each is the label of the token before
                it. -100 for no label.
            use_cache: create a cache if none is given; None creates one except in training.
            logits_to_keep: the number of last tokens, or the indices of the tokens, whose logits are returned; 0 for
                all.
            num_items_in_batch: the number of labels in all batches of an optimizer step, by which the sum of losses is
                divided; None for the labels of this batch.

        Returns:
            ``loss`` in nats, a scalar, including the weights' penalty; ``logits [B, L, vocab]``, None in training with
            labels (the loss is computed in parts, without all logits in memory); ``past_key_values``.

        Raises:
            InputError: an invalid mask or cache, or an argument that this model does not have.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise InputError(name, value, "is no argument of this model")
        cache = _cache(past_key_values, not self.training if use_cache is None else use_cache)
        segments = _segments(attention_mask, input_ids, cache)
        dropout_seeds = torch.randint(2**62, input_ids.shape[:1], device=input_ids.device) if self.training else None
        span = Span() if cache is None else cache.span
        span = span.with_carry(span.carry, segments=segments, dropout_seeds=dropout_seeds)
        if self.model.config.positions != "none" and attention_mask is not None and not attention_mask[:, 0].all():
            allowed = f"no padding on the left: the model's {self.model.config.positions} positions would count it"
            raise InputError("attention_mask", "0 in the first column", allowed, "padding_side='right'")
        self.model.recompute = self.gradient_checkpointing and self.training
        x, penalty = self.model.features(input_ids, span)
        if cache is not None:
            cache.span = span.next_block(input_ids.shape[1])
        loss = logits = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            num_labels = (shifted != IGNORED).sum().clamp(min=1)
            num_items = num_labels if num_items_in_batch is None else num_items_in_batch
            loss = (self.model.head(x, shifted).sum() + penalty * num_labels) / num_items
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(x[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


def _cache(given: Any, use_cache: bool) -> LongreachCache | None:
    """The given cache, else a new one if ``use_cache``."""
    if given is None:
        return LongreachCache() if use_cache else None
    if not isinstance(given, LongreachCache):
        raise InputError("past_key_values", type(given).__name__, "a LongreachCache, or None to begin")
    return given


def _segments(mask: Tensor | None, input_ids: Tensor, cache: LongreachCache | None) -> Tensor | None:
    """Document ids ``[B, L]``: 0 for a row's left padding, 1 from its first token on; None without left padding.

    Right padding needs no document of its own: the model is causal.
    """
    carries = [] if cache is None else list(cache.span.carry.values())
    padded = any(carry.segment is not None for carry in carries)  # earlier calls had left padding
    if mask is None:
        return torch.ones_like(input_ids) if padded else None
    if mask.dim() != 2 or mask.shape[0] != input_ids.shape[0] or mask.shape[1] < input_ids.shape[1]:
        raise InputError("attention_mask", [*mask.shape], f"[batch, tokens], at least {[*input_ids.shape]}")
    is_token = mask != 0
    begun = is_token.cumsum(1) > 0
    if (is_token[:, 1:] & ~is_token[:, :-1] & begun[:, :-1]).any():
        raise InputError("attention_mask", "0 between 1s", "padding must be before or after a row's tokens")
    if not padded and begun[:, 0].all():
        return None
    if carries and not padded:
        raise InputError("attention_mask", "0 at the beginning", "was not given with the tokens in the cache")
    return begun[:, -input_ids.shape[1] :].to(input_ids.dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A transformers tokenizer whose tokens are the bytes of the text's UTF-8; the id is the byte's value.

    It pads on the left with id 0, which is a special token: ``skip_special_tokens=True`` removes it from decoded text.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # The byte-level pre-tokenizer maps each byte to one of these characters. Byte 0 is not among them: it is matched in
    # the text as the padding token.
    names = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others) if byte}
    tokenizer = Tokenizer(models.BPE(vocab={"\0": 0} | names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=AddedToken("\0", normalized=False, special=True),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


AutoConfig.register(MODEL_TYPE, LongreachConfig)
AutoModelForCausalLM.register(LongreachConfig, LongreachForCausalLM)
