"""Carry files: the states of all mixers after some tokens, from which decoding continues later.

The file is safetensors, which cannot hold code. Its tensors are, for each carry of the span, ``<key>.state`` (and
``<key>.segment`` if documents are kept apart), complex ones as pairs of real numbers; ``logits`` of the next token; and
``random``, the state of the random generator. Its metadata has one entry, ``longreach``, JSON of

    format      2; of format 1, whose keys numbered the calls of a layer, files are read
    model       the SHA-256 of the model's configuration and weights, `fingerprint`
    position    the number of tokens read
    complex     the names of the complex tensors
    sha256      of the tensors
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import _aliases
from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.span import Span
from ..checkpoint import differences, tensors_of
from ..model import SequenceModel
from ..model.directory import ORIGIN
from ..runtime.files import remove, write_tensors

FORMAT = 2
GROWING = (".by_channel", ".attention")  # in the names of states that may hold a row for each token
STATE, SEGMENT, LOGITS, RANDOM = ".state", ".segment", "logits", "random"
RNG_BYTES = {5056: "cpu", 16: "cuda"}  # of the state of torch's random generator


class SavedCarry(NamedTuple):
    """What decoding needs to continue after some tokens.

    Attributes:
        span: of the next token, with the carry.
        logits: ``[B, vocab]`` of the next token.
        rng_state: uint8 ``[n]``, the state of the random generator for sampling; None if it is to be seeded anew.
    """

    span: Span
    logits: Tensor
    rng_state: Tensor | None


def fingerprint(model: SequenceModel) -> str:
    """The SHA-256 of a model's configuration and tensors; equal for a run's model and its export."""
    shape = {name: value for name, value in dataclasses.asdict(model.config).items() if name not in ORIGIN}
    return _digest(tensors_of(model), hashlib.sha256(json.dumps(shape, sort_keys=True).encode()))


def pack(carries: Mapping[str, Carry]) -> dict[str, Tensor]:
    """Convert the carries of a span to named tensors; see `unpack`."""
    found = {key + STATE: carry.state for key, carry in carries.items()}
    return found | {key + SEGMENT: carry.segment for key, carry in carries.items() if carry.segment is not None}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Carry]:
    """Convert named tensors back to the carries of a span; tensors with other names are ignored."""
    keys = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    return {key: Carry(tensors[key + STATE], tensors.get(key + SEGMENT)) for key in keys}


def save(path: str | Path, model: SequenceModel, saved: SavedCarry) -> None:
    """Write a carry file atomically: an earlier file at ``path`` is replaced once all is written.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    assert saved.rng_state is not None
    tensors = pack(saved.span.carry) | {LOGITS: saved.logits, RANDOM: saved.rng_state}
    kept = {name: _real(tensor).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model": fingerprint(model),
        "position": saved.span.start,
        "complex": sorted(name for name, tensor in tensors.items() if tensor.is_complex()),
        "sha256": _digest(kept, hashlib.sha256()),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_tensors(partial, kept, {"longreach": json.dumps(header)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        remove(partial)
        raise InputError(
            "carry", str(path), f"cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None


def load(path: str | Path, model: SequenceModel, keep_rng: bool = True) -> SavedCarry:
    """Read a carry file; its tensors are on the model's device, the state of the random generator on the CPU.

    Args:
        path: of the file.
        model: that wrote it.
        keep_rng: read the state of the random generator, which depends on the kind of device.

    Raises:
        InputError: the file is missing, damaged, of another format, or the carry of another model.
    """
    device = next(model.parameters()).device
    try:
        with safe_open(path, "pt") as file:
            header = _header(path, (file.metadata() or {}).get("longreach", ""))
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError("carry", str(path), f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError("carry", str(path), f"is damaged: {error}") from None
    if header["model"] != fingerprint(model):
        raise InputError("carry", str(path), "is of another model", "take the run that wrote it, at the same step")
    if header["sha256"] != _digest(found, hashlib.sha256()):
        raise InputError("carry", str(path), "is damaged: its SHA-256 is not the one that was written")
    try:
        tensors = {n: torch.view_as_complex(x) if n in header["complex"] else x for n, x in found.items()}
        if header["format"] == 1:
            carries = unpack(tensors)
            others = {name: x for name, x in tensors.items() if not name.endswith((STATE, SEGMENT))}
            tensors = others | pack({_aliases.carry_key(key, list(carries)): carries[key] for key in carries})
        if mismatch := _mismatch(model, tensors, header["position"]):
            raise InputError("carry", str(path), f"does not fit the model: {mismatch}")
        if keep_rng:
            _check_rng_state(path, tensors[RANDOM], device)
    except (RuntimeError, TypeError) as error:
        raise InputError("carry", str(path), f"is damaged: {error}") from None
    rng_state = tensors.pop(RANDOM)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    span = Span(start=header["position"], carry=unpack(tensors), keep_carry=True)
    return SavedCarry(span, tensors[LOGITS], rng_state if keep_rng else None)


def _check_rng_state(path: str | Path, state: Tensor, device: torch.device) -> None:
    """Raise `InputError` unless ``state`` is that of a random generator on ``device``."""
    kind = RNG_BYTES.get(state.numel(), device.type)
    if kind != device.type:
        allowed = f"was saved on {kind}, and the state of its random generator does not fit {device.type}"
        raise InputError("carry", str(path), allowed, "give a seed (--seed) for a new one")
    torch.Generator(device=device).set_state(state)


def _header(path: str | Path, text: str) -> dict[str, Any]:
    """Parse and check the metadata of a carry file."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or "format" not in header:
        raise InputError("carry", str(path), "is no file that --carry-out wrote")
    if header["format"] not in (1, FORMAT):
        raise InputError("carry", str(path), f"is of format {header['format']!r}; this version reads 1 and {FORMAT}")
    position, names = header.get("position"), header.get("complex")
    if not isinstance(position, int) or not 1 <= position < 1 << 53 or not isinstance(names, list):
        raise InputError("carry", str(path), "is damaged: entries are missing")
    return {"model": None, "sha256": None} | header


@torch.no_grad()
def _mismatch(model: SequenceModel, tensors: Mapping[str, Tensor], position: int) -> str:
    """How the names, shapes or types of tensors differ from the model's carry after ``position`` tokens; empty if not.

    The expected ones are taken from a forward pass over one token. `GROWING` states may hold one row for each token
    read.
    """
    parameter = next(model.parameters())
    rows = tensors[LOGITS].shape[0] if LOGITS in tensors and tensors[LOGITS].dim() else 0
    if not rows:
        return f"{LOGITS} has no rows"
    span = Span(keep_carry=True)
    features = model.features(torch.zeros(1, 1, dtype=torch.int64, device=parameter.device), span)[0]
    expected = pack(span.carry_out) | {LOGITS: model.head(features[:, -1])}
    shapes = {name: [rows, *tensor.shape[1:]] for name, tensor in expected.items()}
    for name, shape in shapes.items():
        grows = any(verb in name for verb in GROWING) and name in tensors and shape[1] == 1
        shape[1] = position if grows and tensors[name].shape[1:2] == (position,) else shape[1]
    found = {name: [*tensor.shape] for name, tensor in tensors.items() if name != RANDOM}
    wrong = [name for name in expected if name in tensors and not _is_of(tensors[name].dtype, expected[name].dtype)]
    wrong += [] if RANDOM in tensors else [RANDOM]
    return differences(found, shapes) or ", ".join(f"{name} is missing or of another type" for name in wrong)


def _is_of(dtype: torch.dtype, expected: torch.dtype) -> bool:
    """Whether it is the dtype of a prefilled state, or the wider one that a step of decoding makes of it."""
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return dtype in (expected, wider.get(expected))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _digest(tensors: Mapping[str, Tensor], hash_: Any) -> str:
    """Update ``hash_`` with names, dtypes, shapes and bytes of tensors; return its hexadecimal digest."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hash_.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        hash_.update(tensor.flatten().view(torch.uint8).numpy().data)
    digest: str = hash_.hexdigest()
    return digest


def __getattr__(name: str) -> Any:
    return _aliases.attribute(__name__, name)
