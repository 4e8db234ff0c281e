"""`longreach.framework.hf.adapt`: models of transformers under a `Span` compute what transformers computes alone.

Comparisons at 1e-9 run both sides in fp64 throughout (`hf_models.Wide`); fp32 ones run as they are.
"""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, run_distributed
from torch import Tensor, nn

from longreach.errors import InputError
from longreach.parallel import streaming
from longreach.parallel.mesh import Axis, Mesh
from longreach.parallel.span import Span

transformers = pytest.importorskip("transformers")
hf_models = pytest.importorskip("hf_models")

from longreach.framework.hf import adapt, hidden_states, logits, set_recompute  # noqa: E402

LENGTH = 23
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GATES = {torch.float64: 1e-9, torch.float32: 5e-5}  # gradients of decays are differences of larger sums
FLOOR = 1e-2  # an RMS below which a gradient is nothing but rounding
KNOWN = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING)
FAMILIES = [
    pytest.param(family, marks=pytest.mark.skipif(family not in KNOWN, reason="transformers is older"))
    for family in hf_models.FAMILIES
]
STARTS = ((0, 4, 5, 9, 12, 17), (0, 8))
"""Where documents begin: on edges of shards and blocks, inside them, two of one token's length beside each other."""


@dataclass(frozen=True)
class Case:
    """One pass over a sequence of two rows.

    Attributes:
        family: of `hf_models.FAMILIES`.
        packed: whether the rows hold documents, `STARTS`.
        block_len: tokens of a streamed block on each rank; 0 for the whole sequence.
        lengths: tokens of each rank; empty for the usual shares.
        recompute: compute layers again in backward; in fp32, as `hf_models.Wide` is off there.
        dtype: of weights and activations.
        changes: further settings of the model's configuration.
    """

    family: str
    packed: bool = False
    block_len: int = 0
    lengths: tuple[int, ...] = ()
    recompute: bool = False
    dtype: torch.dtype = torch.float64
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def starts(self) -> list[list[int]]:
        return [list(row) for row in STARTS] if self.packed else [[0], [0]]

    @property
    def segments(self) -> Tensor | None:
        if not self.packed:
            return None
        return torch.tensor([[sum(start <= i for start in row) for i in range(LENGTH)] for row in STARTS])

    def model(self) -> nn.Module:
        return hf_models.build(self.family, dtype=self.dtype, **dict(self.changes))


def precision(dtype: torch.dtype) -> Any:
    return hf_models.Wide() if dtype == torch.float64 else torch.enable_grad()


def run(axis: Axis, case: Case) -> dict[str, Tensor]:
    """This rank's logits (zeros at the tokens of others), and its summands of the loss and of all gradients."""
    tokens, labels = hf_models.data(LENGTH)
    spans = streaming.blocks(Mesh(sequence=axis), LENGTH, case.block_len, segments=case.segments)
    if case.lengths:
        spans = [replace(spans[0], lengths=case.lengths)]
        spans[0].segments = None if case.segments is None else spans[0].shard(case.segments)
    logits, total = torch.zeros(*tokens.shape, hf_models.VOCAB, dtype=case.dtype), torch.zeros((), dtype=case.dtype)
    model = adapt(case.model())
    set_recompute(model, case.recompute)
    with precision(case.dtype):

        def loss(span: Span) -> Tensor:
            found = model(span.shard(tokens), span=span).logits
            logits[:, span.position : span.position + found.shape[1]] = found.detach()
            value = hf_models.nll(found, span.shard(labels))
            total.add_(value.detach())
            return value

        streaming.train(spans, lambda span: model(span.shard(tokens), span=span), loss, Tensor.backward)
    return {"logits": logits, "loss": total, **hf_models.gradients(model)}


def run_all(axis: Axis, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [run(axis, case) for case in cases]


@cache
def alone(case: Case) -> dict[str, Tensor]:
    """What transformers computes, a document at a time."""
    model = case.model()
    with precision(case.dtype):
        return hf_models.plain(model, *hf_models.data(LENGTH), case.starts)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative RMS error, with a floor for what is nothing but rounding."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=FLOOR * wanted.numel() ** 0.5))


def check(cases: list[Case], ranks: int) -> None:
    """Compare with transformers in fp64; where its own rounding in fp32 is above the tolerance, it is the measure."""
    parts = run_distributed(run_all, ranks, cases) if ranks > 1 else [run_all(Axis(), cases)]
    for number, case in enumerate(cases):
        plain = replace(case, block_len=0, lengths=(), recompute=False)
        theirs, exact = alone(plain), alone(replace(plain, dtype=torch.float64))
        own = {name: error(theirs[name], wanted) for name, wanted in exact.items()}
        for name, wanted in exact.items():
            found = torch.stack([part[number][name] for part in parts]).sum(0)
            measure = own[name] if name in ("logits", "loss") else max(own.values())
            limit = max((GATES if name.endswith(("A_log", "dt_bias")) else TOLERANCE)[case.dtype], 3 * measure)
            assert_close(f"{case}: {name}", found, wanted, rel_rms=limit, rms_floor=FLOOR)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_transformers_alone(family: str, ranks: int) -> None:
    """Logits, loss and all gradients: whole and streamed, shards of few tokens or none, documents, recomputed."""
    case = Case(family)
    narrow = replace(case, dtype=torch.float32)
    cases = {
        1: [narrow, replace(case, packed=True, block_len=4)],
        2: [replace(narrow, block_len=3, recompute=True), replace(case, lengths=(3, 20), packed=True)],
        3: [replace(case, lengths=(21, 0, 2)), replace(case, packed=True, block_len=4)],
    }
    check(cases[ranks], ranks)


@pytest.mark.parametrize("heads", [1, 2])
def test_more_ranks_than_heads_of_keys_and_values(heads: int) -> None:
    """Four ranks for 1 or 2 heads of keys and values: some ranks hold no head of their own, and one no last token."""
    cases = []
    for family in ("llama", "mistral", "qwen3"):
        case = Case(family, changes=(("num_key_value_heads", heads),))
        cases += [replace(case, lengths=(6, 9, 1, 7)), replace(case, packed=True, block_len=5)]
    check(cases, 4)


def test_limits_of_step_sizes() -> None:
    """Which transformers has in its parallel form alone."""
    check([Case("bamba", packed=True, block_len=6, changes=(("time_step_limit", (0.1, 0.7)),))], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_token_by_token(family: str) -> None:
    """From the carry of a prompt that was read in two blocks: equals the parallel pass, and transformers' own cache."""
    tokens, _ = hf_models.data(LENGTH)
    with hf_models.Wide(), torch.no_grad():
        model = hf_models.build(family, dtype=torch.float64).eval()
        whole = model(tokens, use_cache=False).logits
        theirs, past = [], None
        cached = "cache_params" if family == "mamba2" else "past_key_values"
        adapted = adapt(copy.deepcopy(model))
        ours, span = [], Span(keep_carry=True)
        for size in [7, 2, *[1] * (LENGTH - 9)]:
            block = tokens[:, span.start : span.start + size]
            ours.append(adapted(block, span=span).logits)
            span = span.next_block(size)
        for size in [9, *[1] * (LENGTH - 9)]:
            start = sum(x.shape[1] for x in theirs)
            position = torch.arange(start, start + size).unsqueeze(0)  # some families count from 0 at every call
            place = {} if family == "mamba2" else {"position_ids": position}
            out = model(tokens[:, start : start + size], **{cached: past}, use_cache=True, **place)
            theirs.append(out.logits)
            past = out[cached]
    assert_close("ours, the parallel pass", torch.cat(ours, dim=1), whole, rel_rms=1e-9)
    assert_close("ours, their decoding", torch.cat(ours, dim=1), torch.cat(theirs, dim=1), rel_rms=1e-9)


def test_documents_and_positions_matter() -> None:
    """The comparisons above would not see what makes no difference."""
    for family in hf_models.FAMILIES:
        if family in KNOWN:
            whole, packed = (alone(Case(family, packed=packed))["logits"] for packed in (False, True))
            error = (whole[0] - packed[0]).square().mean(-1).sqrt()
            assert error[:4].max() < 1e-9 < 1e-3 < error[4:].min(), family


# What is refused.


def refused(model: nn.Module, *words: str, span: Span | None = None, **arguments: Any) -> None:
    """Neither `adapt` nor a call with a span gives an answer; the message, of one line, has all ``words``."""
    tokens, _ = hf_models.data(LENGTH)
    with pytest.raises(InputError) as caught:
        adapt(model)(tokens, span=span or Span(), **arguments)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message


def unknown(family: str, **changes: Any) -> nn.Module:
    if family not in KNOWN:
        pytest.skip("transformers is older")
    return hf_models.build(family, **changes)


def test_families_with_another_recurrence_are_refused() -> None:
    """Mamba-1's scan is a loop in the layer's forward, RWKV's too: nothing to put a form of ours in its place."""
    mamba = {"num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3, "use_mambapy": False}
    refused(unknown("mamba", **mamba), "backbone.layers.0.mixer", "MambaMixer")
    refused(unknown("falcon_mamba", **mamba), "backbone.layers.0.mixer", "FalconMambaMixer")
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "num_experts": 2}
    jamba = {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 4, "num_hidden_layers": 3, **attention}
    refused(unknown("jamba", **jamba, use_mamba_kernels=False), "model.layers.1.mamba", "JambaMambaMixer")
    refused(unknown("rwkv", num_hidden_layers=2, attention_hidden_size=32), "rwkv.blocks.0.attention")


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, dims=1)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / 8


class Slice(nn.Module):
    """Token shift as of RWKV, by slices alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, :-1]], dim=1)


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class Mix(nn.Module):
    """A product over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[1], x.shape[1]).tril() @ x / 8


class Flat(nn.Module):
    """The tokens hidden in another shape."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return (rows + rows.roll(1, dims=0)).view_as(x)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, groups=32, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Recurrent(nn.GRU):
    def __init__(self) -> None:
        super().__init__(32, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Attention(nn.MultiheadAttention):
    """Attention that does not come by transformers' interface."""

    def __init__(self) -> None:
        super().__init__(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Chosen(nn.Module):
    """An expert that takes the half of the tokens that it likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        best = score.topk(max(1, x.shape[1] // 2), dim=1).indices
        return x * torch.zeros_like(score).scatter(1, best, 1.0)


class Capacity(nn.Module):
    """Experts that take two tokens each, those that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        expert = nn.functional.one_hot(self.score(x).argmax(-1), 2)
        place = (expert.cumsum(1) * expert).sum(-1, keepdim=True)
        return x * (place <= 2)


class Positions(nn.Module):
    """Adds positions that it counts from its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]))


MIXERS = (Roll, Sum, Slice, Pool, Mix, Flat, Convolution, Recurrent, Attention, Chosen, Capacity, Positions)


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_unknown_mixer_in_a_known_model_is_refused(mixer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = unknown("llama")
    layer = model.get_submodule("model.layers.1")
    layer.mlp = nn.Sequential(layer.mlp, mixer())
    refused(model, "model.layers.1.mlp.1", mixer.__name__)


def test_a_pointwise_module_of_ones_own_is_not_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((32,), 1.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * self.weight

    tokens, _ = hf_models.data(LENGTH)
    model = hf_models.build("llama")
    layer = model.get_submodule("model.layers.1")
    layer.mlp = nn.Sequential(layer.mlp, Scale())
    expected = model(tokens).logits
    assert_close("logits", adapt(model)(tokens, span=Span()).logits, expected, rel_rms=1e-5)


@pytest.mark.parametrize(
    ("family", "function", "parameter", "layer"),
    [
        ("mamba2", "causal_conv1d_fn", "activation", "backbone.layers.0.mixer"),
        ("mamba2", "mamba2_chunk_scan", "dt_softplus", "backbone.layers.0.mixer"),
        ("bamba", "mamba2_chunk_scan", "initial_states", "model.layers.0.mamba"),
        ("olmo_hybrid", "torch_chunk_gated_delta_rule", "g", "model.layers.0.linear_attn"),
        ("qwen3_next", "torch_chunk_gated_delta_rule", "beta", "model.layers.0.linear_attn"),
        ("kimi_linear", "chunk_kimi_delta_attention", "g", "model.layers.0.self_attn"),
        ("lfm2", "causal_conv1d_fn", "bias", "model.layers.0.conv"),
    ],
)
def test_a_function_whose_signature_changed_is_refused(
    family: str, function: str, parameter: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later transformers may do: the same name, with a parameter that means something else."""
    model = unknown(family)
    module = sys.modules[type(model).__module__]
    original = getattr(module, function)
    signature = inspect.signature(original)
    parameters = [
        entry.replace(name="renamed") if name == parameter else entry for name, entry in signature.parameters.items()
    ]

    def changed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    changed.__name__, changed.__module__ = function, module.__name__
    changed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, function, changed)
    refused(model, layer, function, "renamed")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4}),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}),
    ],
)
def test_attention_with_arguments_that_we_do_not_have_is_refused(family: str, changes: dict[str, Any]) -> None:
    """Sinks, and a cap on the scores: other numbers than those of plain softmax."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24}
    model = unknown(family, **sizes, **changes, num_hidden_layers=2)
    refused(model, "model.layers.0.self_attn", type(model.get_submodule("model.layers.0.self_attn")).__name__)


def test_attention_with_dropout_is_refused_in_training() -> None:
    model = hf_models.build("llama", attention_dropout=0.1)
    refused(model, "config.attention_dropout", "0.1")
    tokens, _ = hf_models.data(LENGTH)
    model.eval()
    expected = model(tokens).logits
    assert_close("logits", adapt(model)(tokens, span=Span()).logits, expected, rel_rms=1e-5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(LENGTH)])
def test_layers_that_mix_or_draw_in_training_alone_are_refused_then(layer: nn.Module) -> None:
    model = hf_models.build("llama")
    parent = model.get_submodule("model.layers.1")
    parent.mlp = nn.Sequential(parent.mlp, nn.Identity())
    adapt(model)
    parent.mlp[1] = layer
    refused(model, "model.layers.1.mlp.1", type(layer).__name__)


def test_recomputation_of_transformers_is_refused() -> None:
    """It would compute layers again when the span is gone."""
    model = hf_models.build("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    refused(model, "gradient_checkpointing", "set_recompute")


def test_positions_that_begin_elsewhere_are_refused() -> None:
    """RoBERTa's first token has the position ``pad_token_id + 1``."""
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24, "pad_token_id": 1}
    model = unknown("roberta", **sizes, is_decoder=True, max_position_embeddings=64)
    refused(model, "roberta.embeddings", "other numbers")


def test_attention_in_both_directions_has_no_blocks() -> None:
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24, "pad_token_id": 0}
    settings = transformers.BertConfig(vocab_size=hf_models.VOCAB, hidden_size=32, **sizes)
    model = transformers.BertForMaskedLM(settings).eval()
    hf_models.randomize(model)
    tokens, _ = hf_models.data(LENGTH)
    expected = model(tokens).logits
    assert_close("logits", adapt(model)(tokens, span=Span()).logits, expected, rel_rms=1e-5)
    refused(model, "bert.encoder.layer.0.attention.self", "both directions", span=Span(keep_carry=True))


def test_arguments_that_contradict_a_span_are_refused() -> None:
    tokens, labels = hf_models.data(LENGTH)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(LENGTH).expand(2, -1),
        "past_key_values": transformers.DynamicCache(),
        "use_cache": True,
        "output_attentions": True,
        "labels": labels,
    }
    for name, value in arguments.items():
        refused(hf_models.build("llama"), name, **{name: value})


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_losses_of_routers_are_refused(family: str) -> None:
    """They are averages over all tokens of products of averages: no sum over ranks."""
    refused(unknown(family), "output_router_logits", output_router_logits=True)
    refused(unknown(family, output_router_logits=True), "output_router_logits")


# One instance only.


@pytest.mark.parametrize("family", ["bamba", "olmo_hybrid", "llama", "mistral"])
def test_other_instances_are_untouched(family: str, tmp_path: Path) -> None:
    """Functions of the library, other models of the class, names and files of weights, generation without a span."""
    tokens, _ = hf_models.data(LENGTH)
    model, other = (unknown(family).eval() for _ in range(2))
    module = sys.modules[type(model).__module__]
    functions = {name: value for name, value in vars(module).items() if callable(value)}
    attention = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    names, config = list(model.state_dict()), copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        expected = other(tokens).logits
    generated = other.generate(tokens[:, :6], max_new_tokens=5, do_sample=False)

    adapted = adapt(model)
    assert adapted is model
    model(tokens, span=Span()).logits.sum().backward()
    assert {name: value for name, value in vars(module).items() if callable(value)} == functions
    kept = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    assert {name: kept[name] for name in attention} == attention
    assert list(model.state_dict()) == names
    with torch.no_grad():
        for name, found in (("other", other), ("without a span", model)):
            assert torch.equal(found(tokens).logits, expected), name
    assert torch.equal(model.generate(tokens[:, :6], max_new_tokens=5, do_sample=False), generated)

    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded) is type(other)
    found = loaded.config.to_dict()
    assert {key for key in config if config[key] != found.get(key)} <= {"_name_or_path", "architectures", "dtype"}
    with torch.no_grad():
        assert_close("loaded", loaded(tokens).logits, expected, rel_rms=1e-6)


@pytest.mark.parametrize("family", ["bamba", "olmo_hybrid", "lfm2"])
def test_a_copy_of_an_adapted_model_is_adapted(family: str) -> None:
    """The copy computes with its own weights."""
    tokens, _ = hf_models.data(LENGTH)
    model = adapt(unknown(family).eval())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(tokens, span=Span()).logits
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        expected = twin(tokens).logits
        assert torch.equal(model(tokens, span=Span()).logits, before)
        assert_close("copy", twin(tokens, span=Span()).logits, expected, rel_rms=1e-5)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["zamba2", "gemma3_text"])
def test_hidden_states_and_the_head_apart(family: str) -> None:
    """What trains without logits of the whole sequence; and embeddings in the place of tokens."""
    tokens, _ = hf_models.data(LENGTH)
    model = adapt(unknown(family).eval())
    with torch.no_grad():
        expected = model(tokens).logits
        found = logits(model, hidden_states(model, tokens, Span()))
        assert_close("by hidden states", found, expected, rel_rms=1e-4)
        embedded = model.get_input_embeddings()(tokens)  # type: ignore[operator]
        assert_close("embedded", model(inputs_embeds=embedded, span=Span()).logits, expected, rel_rms=1e-4)


def test_adapting_twice_changes_nothing() -> None:
    tokens, _ = hf_models.data(LENGTH)
    model = adapt(hf_models.build("llama").eval())
    with torch.no_grad():
        before = model(tokens, span=Span()).logits
        assert torch.equal(adapt(model)(tokens, span=Span()).logits, before)
