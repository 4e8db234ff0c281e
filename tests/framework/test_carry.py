"""Carries as files: stopping anywhere, saving, loading and going on is the same, bit by bit, as not stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from longreach.errors import InputError
from longreach.framework.inference import carry_file as carry
from longreach.framework.inference.generate import Decoder, generate
from longreach.framework.model import Model, ModelConfig, build_model
from longreach.kernels.scan import Carry

MIXERS = ["elementwise", "chela", "feedforward_kernel", "mamba2", "gated_deltanet", "softmax"]


def small_model(seed: int = 0, mixers: list[str] = MIXERS, dtype: torch.dtype = torch.float32) -> Model:
    config = ModelConfig(vocab=256, width=16, depth=len(mixers), mixers=mixers)
    config.chela.heads = config.feedforward_kernel.heads = config.softmax.heads = 2
    config.mamba2.head_width = 8
    torch.manual_seed(seed)
    model = build_model(config).to(dtype).eval()
    for parameter in model.blocks.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def text(length: int, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(length))


def written(decoder: Decoder, num_tokens: int, **how: float) -> list[list[int]]:
    return [token.tolist() for token in decoder.generate(num_tokens, **how)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.3, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stop", [0, 1, 9])
def test_going_on_is_as_if_nothing_had_been_between(
    how: dict[str, float], stop: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """After 0, 1 or 9 of 24 tokens, by every mixer, in two rows, with another prompt after them; files too."""
    model, prompt, more = small_model(dtype=dtype), text(13, rows=2), text(5, rows=2)
    whole = Decoder(model, seed=3)
    whole.prefill(prompt)
    expected = written(whole, 24, **how)
    whole.prefill(more)
    expected += written(whole, 6, **how)
    whole.save(tmp_path / "whole")

    first = Decoder(model, seed=3)
    first.prefill(prompt)
    found = written(first, stop, **how)
    first.save(tmp_path / "carry")
    second = Decoder.load(small_model(dtype=dtype), tmp_path / "carry")
    assert second.span is not None and second.span.position == 13 + stop
    found += written(second, 24 - stop, **how)
    second.save(tmp_path / "carry")
    third = Decoder.load(model, tmp_path / "carry")
    third.prefill(more)
    found += written(third, 6, **how)
    third.save(tmp_path / "carry")
    assert found == expected and len({*map(tuple, found)}) > 5
    assert (tmp_path / "carry").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["carry", "whole"]


def test_a_new_seed_determines_the_samples(tmp_path: Path) -> None:
    model = small_model()
    decoder = Decoder(model, seed=1)
    decoder.prefill(text(9))
    decoder.save(tmp_path / "carry")
    expected = [token.tolist() for token in generate(model, text(9), 12, seed=8)]
    assert written(Decoder.load(model, tmp_path / "carry", seed=8), 12) == expected
    assert written(Decoder.load(model, tmp_path / "carry"), 12) == written(decoder, 12) != expected


def test_forks_do_not_see_each_other() -> None:
    """Several texts after one beginning, each as if it were the only one; the stem is as it was."""
    model, stem = small_model(), Decoder(small_model(), seed=2)
    stem.prefill(text(11))
    for number in (3, 4, 3):
        alone, fork = Decoder(model, seed=2), stem.fork()
        alone.prefill(text(11))
        for decoder in (alone, fork):
            decoder.prefill(text(number))
        assert written(fork, 12) == written(alone, 12)


def test_a_reading_that_was_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the carry nor in the position: another reading begins where the first one did."""
    model, decoder = small_model(), Decoder(small_model())
    decoder.prefill(text(7))
    head = decoder.model.head.forward

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder.model.head, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill(text(8))
    monkeypatch.setattr(decoder.model.head, "forward", head)
    decoder.prefill(text(5))
    whole = Decoder(model)
    assert (whole.rows, decoder.rows) == (0, 1)
    whole.prefill(text(7))
    whole.prefill(text(5))
    assert written(decoder, 9) == written(whole, 9)


def test_stopping_within_the_writing_counts_what_was_taken(tmp_path: Path) -> None:
    model = small_model()
    decoder, whole = Decoder(model), Decoder(model)
    for one in (decoder, whole):
        one.prefill(text(7))
    tokens = decoder.generate(100)
    found = [next(tokens).tolist() for _ in range(4)]
    decoder.save(tmp_path / "carry")
    assert found + written(Decoder.load(model, tmp_path / "carry"), 5) == written(whole, 9)


def test_carries_pack_and_unpack() -> None:
    carries = {"a.scan0": Carry(torch.randn(1, 2)), "b.halo1": Carry(torch.randn(1, 3), torch.zeros(1, 3).long())}
    assert carry.unpack(carry.pack(carries)) == carries


def test_top_p_samples_from_the_fewest_that_make_it_up() -> None:
    """Counted against the definition; the likeliest is always among them, and 1 changes no sample."""
    model, prompt = small_model(), text(9).expand(200, 9)
    with torch.no_grad():
        ranked, order = model(prompt[:1])[0, -1].float().softmax(-1).sort(descending=True)
    for top_p in (1e-9, 0.3, 0.7):
        wanted = int((ranked.cumsum(0) < top_p).sum()) + 1
        sampled = next(generate(model, prompt, 1, top_p=top_p, seed=1)).unique()
        assert {*sampled.tolist()} <= {*order[:wanted].tolist()}
        assert len(sampled) == 1 if wanted == 1 else len(sampled) > wanted / 3
    plain, all_of_it = (next(generate(model, prompt, 1, top_p=p, top_k=k)) for p, k in ((1.0, 0), (1.0, 256)))
    assert torch.equal(plain, all_of_it)


def rewrite(
    path: Path, tensors: Callable[[dict[str, Tensor]], Any] = lambda t: None, honest: bool = False, **header: Any
) -> None:
    """Change tensors and header; the digest with them, as someone would who lies, unless ``honest``."""
    found = load_file(path)
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["longreach"])
    tensors(found)
    if not honest:
        old["sha256"] = carry._digest(found, carry.hashlib.sha256())
    save_file(found, path, {"longreach": json.dumps(old | header)})


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "cannot be read|No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
    "a pickle": (lambda path: torch.save({}, path), "is damaged"),
    "another file": (lambda path: save_file({"x": torch.ones(1)}, path), "is no file that --carry-out wrote"),
    "another format": (lambda path: rewrite(path, format=3), "is of format 3; this version reads 1 and 2"),
    "another model": (lambda path: rewrite(path, model="0" * 64), "is of another model"),
    "a value": (lambda path: rewrite(path, lambda t: t["logits"].add_(1), honest=True), "is damaged: its SHA-256"),
    "less": (lambda path: rewrite(path, lambda t: t.pop("blocks.0.scan.state")), "blocks.0.scan.state is not in it"),
    "more": (lambda path: rewrite(path, lambda t: t.update(odd=torch.ones(1))), "odd is not in the model"),
    "no logits": (lambda path: rewrite(path, lambda t: t.pop("logits")), "logits has no rows"),
    "no random state": (lambda path: rewrite(path, lambda t: t.pop("random")), "random is missing"),
    "a wrong random state": (lambda path: rewrite(path, lambda t: t.update(random=torch.ones(3).byte())), "is damaged"),
    "a random state of a GPU": (
        lambda path: rewrite(path, lambda t: t.update(random=torch.zeros(16).byte())),
        "was saved on cuda, .* does not fit cpu; give a seed",
    ),
    "another type": (
        lambda path: rewrite(path, lambda t: t.update({"blocks.0.scan.state": t["blocks.0.scan.state"].half()})),
        "blocks.0.scan.state is missing or of another type",
    ),
    "another shape": (
        lambda path: rewrite(path, lambda t: t.update({"blocks.5.by_channel.state": torch.ones(1, 3, 2, 24)})),
        r"blocks.5.by_channel.state is \[1, 3, 2, 24\]",
    ),
    "no position": (lambda path: rewrite(path, position=-1), "entries are missing"),
    "not complex": (lambda path: rewrite(path, complex=["logits"]), "is damaged|does not fit"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_bad_carry_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    harm, expected = HARMS[name]
    decoder = Decoder(small_model())
    decoder.prefill(text(9))
    decoder.save(tmp_path / "carry")
    harm(tmp_path / "carry")
    with pytest.raises(InputError, match=expected) as caught:
        Decoder.load(small_model(), tmp_path / "carry")
    assert "\n" not in str(caught.value)


def test_a_carry_of_a_gpu_goes_on_with_a_seed(tmp_path: Path) -> None:
    model = small_model()
    decoder = Decoder(model, seed=5)
    decoder.prefill(text(9))
    decoder.save(tmp_path / "carry")
    rewrite(tmp_path / "carry", lambda t: t.update(random=torch.zeros(16).byte()))
    assert written(Decoder.load(model, tmp_path / "carry", seed=5), 8) == written(decoder, 8)


def test_a_file_of_format_1_goes_on_as_one_of_format_2(tmp_path: Path) -> None:
    """Its keys numbered the calls of a layer: ``blocks.1.scan1`` was a long convolution, ``blocks.1.scan2`` a scan."""
    model = small_model()
    decoder = Decoder(model, seed=4)
    decoder.prefill(text(9))
    decoder.save(tmp_path / "carry")
    expected = written(decoder, 8)
    calls = {"halo": ["halo0"], "by_channel": ["by_channel0"], "long_conv": ["scan1"], "scan": ["scan1", "scan2"]}

    def number(tensors: dict[str, Tensor]) -> None:
        chela = {name.split(".")[1] for name in tensors if ".long_conv." in name}
        for name in [name for name in tensors if name.startswith("blocks.")]:
            blocks, layer, call, kind = name.split(".")
            old = calls[call][-1] if layer in chela else calls[call][0]
            tensors[f"{blocks}.{layer}.{old}.{kind}"] = tensors.pop(name)

    rewrite(tmp_path / "carry", number, format=1, complex=["blocks.1.scan1.state"])
    assert any(name.endswith("scan2.state") for name in load_file(tmp_path / "carry"))
    assert written(Decoder.load(model, tmp_path / "carry"), 8) == expected


def test_a_carry_of_another_model_is_refused(tmp_path: Path) -> None:
    """Other weights of the same shape, too; and rows that are not those of before."""
    decoder = Decoder(small_model())
    with pytest.raises(InputError, match="prompt"):
        decoder.save(tmp_path / "carry")
    decoder.prefill(text(9))
    decoder.save(tmp_path / "carry")
    with pytest.raises(InputError, match="is of another model"):
        Decoder.load(small_model(seed=1), tmp_path / "carry")
    with pytest.raises(InputError, match="1 rows, as before"):
        decoder.prefill(text(9, rows=2))
    with pytest.raises(InputError, match="cannot be written"):
        decoder.save(tmp_path / "nowhere" / "carry")
