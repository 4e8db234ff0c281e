"""The model as a class of Hugging Face's transformers, with `from_pretrained`, `generate` and `Trainer`.

Importing this module registers the model with the Auto classes, which then load the directories that ``longreach
export`` writes::

    import longreach.framework.inference.huggingface
    model = AutoModelForCausalLM.from_pretrained("exported")

`AutoModel` gives hidden states, `AutoModelForSequenceClassification` classes or numbers for whole sequences.

The cache of transformers is a `Span` with a carry here; its size does not grow with the number of tokens read. No other
module imports this one, because transformers is an optional dependency.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.span import Span
from ..data.labels import IGNORE, next_token_labels
from ..model import Model, ModelConfig
from ..model.heads import SequenceHead, labelled
from ..tasks import TaskDescription
from .loading import MODEL_TYPE, read_json_as

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        Cache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from transformers.modeling_outputs import (
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        SequenceClassifierOutput,
    )
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
        task: the keys of `TaskDescription`, which `longreach predict` needs; None for a language model.

    Args:
        model: a `ModelConfig`, or some of its keys; missing ones have their defaults.
        task: its names of the classes are used, unless others are given.
        kwargs: keys of every transformers configuration.

    Raises:
        InputError: an unknown key, or a value of another type.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    tie_word_embeddings = True

    def __init__(
        self,
        model: ModelConfig | dict[str, Any] | None = None,
        task: TaskDescription | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = dataclasses.asdict(model) if isinstance(model, ModelConfig) else model or {}
        shape = self.shape()
        self.model = dataclasses.asdict(shape)
        self.task = task.as_json() if isinstance(task, TaskDescription) else task
        if shape.head in ("class", "numbers") and not kwargs.keys() & {"id2label", "num_labels"}:
            names = (self.task or {}).get("classes" if shape.head == "class" else "targets") or []
            known = len(names) == shape.outputs
            kwargs["id2label"] = {i: names[i] if known else f"LABEL_{i}" for i in range(shape.outputs)}
            kwargs["label2id"] = {name: i for i, name in kwargs["id2label"].items()}
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
        mask: ``[B, T]`` bool, which of the tokens read are no padding; None where none is.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.span = Span(keep_carry=True)
        self.mask: Tensor | None = None

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
        self.mask = None if self.mask is None else chosen(self.mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same as `batch_select_indices`; called by beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        if self.span.carry:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Discard the carry: the next token is the first of a text."""
        self.span, self.mask = Span(keep_carry=True), None

    @property
    def is_croppable(self) -> bool:
        """False: earlier states cannot be computed from a later one."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise InputError: see `is_croppable`."""
        raise InputError(
            "tokens_to_remove", tokens_to_remove, "a carry cannot take tokens back", "copy.deepcopy it before"
        )


class _Features(NamedTuple):
    """What a model computed before its head.

    Attributes:
        x: the head's input.
        penalty: on the weights, a scalar.
        states: ``[B, L, D]``: the input of each block, then the output of the last one; that alone unless all were
            asked for.
        padding: of the inputs.
        cache: that was given, or a new one.
    """

    x: Tensor
    penalty: Tensor
    states: list[Tensor]
    padding: _Padding
    cache: LongreachCache | None


class LongreachPreTrainedModel(PreTrainedModel):
    """The base of the classes below: a `Model` on one device, for whole sequences or with a cache.

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

    def __init__(self, config: LongreachConfig) -> None:
        super().__init__(config)
        shape = self._shape(config)
        self.model = Model(shape)
        if shape.head == "token":
            self._tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
        if shape.channels:
            self.main_input_name = "input_values"
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _shape(cls, config: LongreachConfig) -> ModelConfig:
        """The configuration of the `Model`; InputError if it does not fit this class."""
        return config.shape()

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, for the directories of transformers and of ``longreach export``.

        Raises:
            InputError: a tensor of the model is missing.
        """
        model, found = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if missing := sorted(name for name in found["missing_keys"] if not cls._may_be_new(name)):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError("model", str(path), f"lacks {missing[0]}{more}")
        return (model, found) if output_loading_info else model

    @staticmethod
    def _may_be_new(name: str) -> bool:
        """Whether a tensor is initialized where a directory lacks it."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `Model` has initialized the weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; where the head is ``token``, its weight is tied to the head's."""
        embedding: nn.Module = self.model.embedding
        return embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, and a tied weight of the head."""
        self.model.embedding = value
        if self.model.config.head == "token":
            self.model.head.weight = value.weight
        self.model.config.vocab = value.num_embeddings

    def _read(
        self,
        inputs: Tensor | None,
        mask: Tensor | None,
        past: LongreachCache | None = None,
        use_cache: bool | None = None,
        *,
        documents: Tensor | None = None,
        all_states: bool = False,
        others: dict[str, Any],
    ) -> _Features:
        """Run the model up to its head.

        Args:
            inputs: ``[B, L]`` int64 or ``[B, L, channels]``.
            mask, past, use_cache: as of `LongreachForCausalLM.forward`.
            documents: ``[B, L]`` int64, 0 and 1 for the tokens of the two documents that are compared.
            all_states: also return what the blocks before the last one computed.
            others: further arguments of ``forward``: none may be given.
        """
        shape = self.model.config
        for name, value in others.items():
            if value is not None and value is not False:
                raise InputError(name, value, "is no argument of this model")
        if inputs is None or inputs.dim() != (3 if shape.channels else 2):
            wanted = f"input_values [B, L, {shape.channels}]" if shape.channels else "input_ids [B, L]"
            raise InputError("inputs", None if inputs is None else [*inputs.shape], wanted)
        has_positions, cache = shape.positions != "none", None
        if shape.causal and shape.head == "token":
            if use_cache is None:  # a cache takes no padding behind tokens where positions count it
                use_cache = not self.training and not (has_positions and mask is not None)
            cache = _cache(past, use_cache)
            padding = _Padding.of(mask, inputs, cache)
            if has_positions and padding.shifts_tokens:
                allowed = f"no padding before a token: the model's {shape.positions} positions would count it"
                fix = "padding_side='right', and use_cache=False"
                raise InputError("attention_mask", "0 before a token", allowed, fix)
        else:
            if past is not None or use_cache:
                raise InputError("use_cache", True, "only a causal model of the next token has a cache")
            padding = _Padding.moved_behind(mask, inputs, documents, shape.documents)
        dropout_seeds = torch.randint(2**62, inputs.shape[:1], device=inputs.device) if self.training else None
        span = Span() if cache is None else cache.span
        span = span.with_carry(span.carry, segments=padding.segments, dropout_seeds=dropout_seeds)
        self.model.recompute = self.gradient_checkpointing and self.training
        with _recorded(self.model, all_states) as states:
            x, penalty = self.model.features(padding.to_left(inputs), span)
        if cache is not None:
            cache.span, cache.mask = span.next_block(inputs.shape[1]), padding.mask
        if not isinstance(self.model.head, SequenceHead):
            x = padding.back(x)
        return _Features(x, penalty, [padding.back(state) for state in states], padding, cache)

    def _hidden_states(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The states of `_Features` as in transformers: the last one is normed, unless the head pools it before."""
        *before, last = states
        norm = cast(nn.Module, self.model.head.norm)
        return (*before, last if isinstance(self.model.head, SequenceHead) else norm(last))

    def _wants_states(self, given: bool | None) -> bool:
        """Whether ``output_hidden_states`` is set, for this call or in the configuration."""
        return bool(self.config.output_hidden_states if given is None else given)


class LongreachModel(LongreachPreTrainedModel):
    """A model without its head: hidden states. `AutoModel` gives it."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongreachCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        input_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of each token.

        Args:
            input_ids, attention_mask, past_key_values, use_cache: as of `LongreachForCausalLM.forward`; a model that is
                not causal, or has another head, has no cache.
            output_hidden_states: return those of all blocks.
            input_values: in place of ``input_ids``, ``[B, L, channels]`` where a token is a vector of numbers.
            token_type_ids: ``[B, L]``, 0 and 1 for the tokens of the two documents that are compared.

        Returns:
            ``last_hidden_state [B, L, D]``: after the last block, and the final norm unless the head pools before it;
            ``past_key_values``; with ``output_hidden_states`` also ``hidden_states``, depth + 1 of ``[B, L, D]``: the
            embedded tokens, the output of each block but the last, and ``last_hidden_state``.

        Raises:
            InputError: an invalid mask or cache, or an argument that this model does not have.
        """
        all_states = self._wants_states(output_hidden_states)
        found = self._read(
            input_ids if input_values is None else input_values,
            attention_mask,
            past_key_values,
            use_cache,
            documents=token_type_ids,
            all_states=all_states,
            others=others,
        )
        states = self._hidden_states(found.states)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=found.cache,
            hidden_states=states if all_states else None,
        )


class LongreachForCausalLM(LongreachPreTrainedModel, GenerationMixin):
    """`Model` as a causal language model of transformers: on one device, for whole sequences or with a cache."""

    @classmethod
    def _shape(cls, config: LongreachConfig) -> ModelConfig:
        shape = config.shape()
        if not shape.causal:
            raise InputError("model.causal", False, "only a causal model can continue a text")
        if shape.head != "token":
            raise InputError("model.head", shape.head, "must be token: other heads predict no next token")
        return shape

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates the cache, not `generate`

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LongreachCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token of each token.

        Args:
            input_ids: ``[B, L]`` int64.
            attention_mask: ``[B, T]``, 0 for padding; T = L, or T counts the tokens in the cache too, whose part must
                be what was given with them. A row may be padded on the left, on the right or on both sides; padding
                does not enter the cache. A row that continues from the cache has none.
            past_key_values: the cache of earlier tokens; it is updated.
            labels: ``[B, L]`` int64, usually ``input_ids``: shifted here, so that each is the label of the token before
                it. -100 for no label.
            use_cache: create a cache if none is given; None creates one, except in training and for a mask where the
                model has positions.
            output_hidden_states: also return those of all blocks, as `LongreachModel` does.
            logits_to_keep: the number of last tokens, or the indices of the tokens, whose logits are returned; 0 for
                all.
            num_items_in_batch: the number of labels in all batches of an optimizer step, by which the sum of losses is
                divided; None for the labels of this batch.

        Returns:
            ``loss`` in nats, a scalar, including the weights' penalty; ``logits [B, L, vocab]``, None in training with
            labels (the loss is computed in parts, without all logits in memory); ``past_key_values``;
            ``hidden_states``.

        Raises:
            InputError: an invalid mask or cache, or an argument that this model does not have.
        """
        all_states = self._wants_states(output_hidden_states)
        found = self._read(input_ids, attention_mask, past_key_values, use_cache, all_states=all_states, others=others)
        x, padding = found.x, found.padding
        loss = logits = None
        if labels is not None:
            if padding.documents is not None:
                labels = labels.masked_fill(padding.documents == 0, IGNORE)
            shifted = next_token_labels(labels, padding.documents)
            num_labels = labelled(shifted).sum()
            num_items = num_labels if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            # Without labels, the loss and its gradients are 0.
            loss = (self.model.head(x, shifted).sum() + found.penalty * num_labels) / num_items.clamp(min=1).to(
                x.device
            )
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(x[:, kept])
        states = self._hidden_states(found.states) if all_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.cache, hidden_states=states)


class LongreachForSequenceClassification(LongreachPreTrainedModel):
    """`Model` with one answer for a whole sequence: a class, or numbers.

    Of a language model it takes all but the output, which is a new one for ``config.num_labels`` classes.
    """

    @classmethod
    def _shape(cls, config: LongreachConfig) -> ModelConfig:
        shape = config.shape()
        if shape.head == "series":
            raise InputError(
                "model.head", shape.head, "must be class, numbers or token: it has an answer for each token"
            )
        if shape.head != "numbers":
            shape.head, shape.outputs = "class", config.num_labels
            config.model |= {"head": shape.head, "outputs": shape.outputs}
        return shape

    @staticmethod
    def _may_be_new(name: str) -> bool:
        return name.startswith("model.head.answer.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a new output; `Model` has initialized the other weights."""
        if isinstance(module, nn.Linear) and module is self.model.head.answer:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        input_values: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Classify each sequence.

        Args:
            input_ids: ``[B, L]`` int64.
            attention_mask: ``[B, L]``, 0 for padding before or after the tokens of a row.
            labels: ``[B]`` int64 classes, -100 for none; numbers ``[B, outputs]``, NaN for none.
            output_hidden_states, input_values, token_type_ids: as of `LongreachModel.forward`.
            num_items_in_batch: as of `LongreachForCausalLM.forward`.

        Returns:
            ``loss``, a scalar, including the weights' penalty: cross entropy in nats, or the mean squared error;
            ``logits [B, num_labels]``, or the numbers; ``hidden_states``.

        Raises:
            InputError: an invalid mask, or an argument that this model does not have.
        """
        all_states = self._wants_states(output_hidden_states)
        found = self._read(
            input_ids if input_values is None else input_values,
            attention_mask,
            documents=token_type_ids,
            all_states=all_states,
            others=others,
        )
        head = cast(SequenceHead, self.model.head)
        logits, loss = head(found.x), None
        if labels is not None:
            labels = labels.view(len(logits), -1) if labels.is_floating_point() else labels.view(len(logits))
            count = labelled(labels.unsqueeze(1)).sum()
            num_items = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            total = head.loss(logits, labels).sum() + found.penalty * count
            loss = total / num_items.clamp(min=1).to(logits.device)
        states = self._hidden_states(found.states) if all_states else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)


@contextmanager
def _recorded(model: Model, all_states: bool) -> Iterator[list[Tensor]]:
    """A list that gets the output of the model's last block, and with ``all_states`` the input of each before it."""
    states: list[Tensor] = []
    blocks = [*model.blocks] if all_states else []
    hooks = [block.register_forward_pre_hook(lambda _, given: states.append(given[0])) for block in blocks]
    hooks.append(model.blocks[-1].register_forward_hook(lambda _, given, output: states.append(output[0])))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _cache(given: Any, use_cache: bool) -> LongreachCache | None:
    """The given cache, else a new one if ``use_cache``."""
    if given is None:
        return LongreachCache() if use_cache else None
    if not isinstance(given, LongreachCache):
        raise InputError("past_key_values", type(given).__name__, "a LongreachCache, or None to begin")
    return given


class _Padding(NamedTuple):
    """Where the rows of a batch are padded.

    Before a row's tokens, padding is a document of its own. After them, it does no harm to a causal model, but for the
    carry that a cache keeps: then `to_left` moves it before them.

    Attributes:
        mask: ``[B, T]`` bool, which tokens are none, those in the cache included; None where none is padding.
        documents: ``[B, L]`` int64, 1 for tokens and 0 for padding; None where none is padding.
        segments: the document ids ``[B, L]`` of the moved tokens, or None.
        order: ``[B, L]``, the place that each moved token had; None where none is moved.
    """

    mask: Tensor | None = None
    documents: Tensor | None = None
    segments: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, input_ids: Tensor, cache: LongreachCache | None) -> _Padding:
        """From the mask of transformers.

        Raises:
            InputError: it does not fit the tokens or the cache, or has padding between tokens.
        """
        (rows, length), read = input_ids.shape, 0 if cache is None else cache.span.start
        past = None if cache is None else cache.mask
        if mask is None:
            mask = torch.ones_like(input_ids)
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (length, read + length):
            known = f" or {[rows, read + length]}" if read else ""
            raise InputError("attention_mask", [*mask.shape], f"[batch, tokens], here {[rows, length]}{known}")
        now = mask[:, mask.shape[1] - length :] != 0
        if mask.shape[1] > length:
            given = mask[:, :read] != 0
            if not (given.all() if past is None else torch.equal(given, past)):
                fix = "give the mask that the tokens in the cache were given with"
                raise InputError("attention_mask", "0 for a token in the cache", "as it was when it was read", fix)
        if past is None and now.all():
            return cls()
        past = now.new_ones(rows, read) if past is None else past
        if (past.any(1, keepdim=True) & ~now).any():
            fix = "give each row as many tokens, or continue it alone"
            raise InputError("attention_mask", "0 after tokens in the cache", "1 for every token that continues", fix)
        begun = now.cumsum(1) > 0
        if (now[:, 1:] & ~now[:, :-1] & begun[:, :-1]).any():
            raise InputError("attention_mask", "0 between 1s", "padding must be before or after a row's tokens")
        documents, order = now.long(), None
        after = (begun & ~now).sum(1, keepdim=True)
        if cache is None:  # padding behind the tokens is seen by none of them
            segments = None if begun[:, 0].all() else begun.long()
        else:
            if after.any():
                order = (torch.arange(length, device=now.device) - after) % length
            segments = documents if order is None else documents.gather(1, order)
        return cls(torch.cat([past, now], dim=1), documents, segments, order)

    @classmethod
    def moved_behind(
        cls, mask: Tensor | None, inputs: Tensor, documents: Tensor | None, num_documents: int
    ) -> _Padding:
        """The same where tokens see later ones, or the head pools: all padding is moved behind the tokens.

        Args:
            mask: ``[B, L]``, or None.
            inputs: ``[B, L, ...]``.
            documents: ``[B, L]`` int64 document ids, or None for one document.
            num_documents: that the model reads.

        Raises:
            InputError: the mask does not fit the inputs, or has padding between tokens; a second document is missing.
        """
        rows, length = inputs.shape[:2]
        if documents is None and num_documents > 1:
            allowed = "0 for the tokens of the first document, 1 for those of the second"
            raise InputError("token_type_ids", None, allowed)
        if mask is None:
            mask = torch.ones(rows, length, device=inputs.device)
        if mask.shape != (rows, length):
            raise InputError("attention_mask", [*mask.shape], f"[batch, tokens], here {[rows, length]}")
        now = mask != 0
        begun = now.cumsum(1) > 0
        if (now[:, 1:] & ~now[:, :-1] & begun[:, :-1]).any():
            raise InputError("attention_mask", "0 between 1s", "padding must be before or after a row's tokens")
        if now.all() and documents is None:
            return cls()
        segments = torch.zeros_like(now, dtype=torch.int64) if documents is None else documents
        segments = segments.masked_fill(~now, num_documents)
        if begun[:, 0].all():
            return cls(segments=segments)
        order = (torch.arange(length, device=now.device) + (~begun).sum(1, keepdim=True)) % length
        return cls(segments=segments.gather(1, order), order=order)

    @property
    def shifts_tokens(self) -> bool:
        """Whether a token's place in its row is not its place in its text."""
        return self.segments is not None and not bool(self.segments[:, 0].all())

    def to_left(self, x: Tensor) -> Tensor:
        """``[B, L, ...]``, moved."""
        return x if self.order is None else _reordered(x, self.order)

    def back(self, x: Tensor) -> Tensor:
        """``[B, L, ...]`` of moved tokens, in the order that they were given in."""
        return x if self.order is None else _reordered(x, self.order.argsort(1))


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """``[B, L, ...]``: row by row, token ``order[b, i]`` at place i."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))


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
AutoModel.register(LongreachConfig, LongreachModel)
AutoModelForCausalLM.register(LongreachConfig, LongreachForCausalLM)
AutoModelForSequenceClassification.register(LongreachConfig, LongreachForSequenceClassification)
