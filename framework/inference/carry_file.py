"""A carry as a file: what a model keeps of a text that it has read, to go on from it later. Nothing in it can execute.

The file is safetensors: of each carry of the span ``<key>.state`` (and ``<key>.segment`` where documents are told
apart), complex numbers as pairs of real ones; ``logits`` of the token that follows; and ``random``, the state of the
generator of draws. Its metadata has one entry, ``longreach``, JSON of

    format      1
    model       the SHA-256 of the model's shape and weights, `fingerprint`
    position    how many tokens were read
    complex     which tensors are complex numbers
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
from safetensors.torch import save_file
from torch import Tensor

from ...errors import InputError
from ...kernels.scan import Carry
from ...parallel.span import Span
from ..checkpoint import differences, tensors_of
from ..model import Model
from ..runtime.files import remove, sync

FORMAT = 1
STATE, SEGMENT, LOGITS, RANDOM = ".state", ".segment", "logits", "random"


class Bookmark(NamedTuple):
    """Where a text was left.

    Attributes:
        span: where it continues.
        logits: ``[B, vocab]`` of the token that follows.
        random: uint8, the state of the generator of draws.
    """

    span: Span
    logits: Tensor
    random: Tensor


def fingerprint(model: Model) -> str:
    """The SHA-256 of a model's configuration and tensors, wherever they lie: a run and its export have the same."""
    shape = json.dumps(dataclasses.asdict(model.config), sort_keys=True)
    return _digest(tensors_of(model), hashlib.sha256(shape.encode()))


def pack(carries: Mapping[str, Carry]) -> dict[str, Tensor]:
    """Carries as named tensors."""
    found = {key + STATE: carry.state for key, carry in carries.items()}
    return found | {key + SEGMENT: carry.segment for key, carry in carries.items() if carry.segment is not None}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Carry]:
    """Carries of named tensors; others are passed over."""
    keys = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    return {key: Carry(tensors[key + STATE], tensors.get(key + SEGMENT)) for key in keys}


def save(path: str | Path, model: Model, mark: Bookmark) -> None:
    """Write where a text was left; what was at ``path`` stays until all is written.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    tensors = pack(mark.span.carry) | {LOGITS: mark.logits, RANDOM: mark.random}
    kept = {name: _real(tensor).clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model": fingerprint(model),
        "position": mark.span.start,
        "complex": sorted(name for name, tensor in tensors.items() if tensor.is_complex()),
        "sha256": _digest(kept, hashlib.sha256()),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(kept, partial, {"longreach": json.dumps(header)})
        sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        remove(partial)
        raise InputError(
            "carry", str(path), f"cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None


def load(path: str | Path, model: Model) -> Bookmark:
    """Read what `save` wrote, on the model's device.

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
        if wrong := _wrong(model, tensors, header["position"]):
            raise InputError("carry", str(path), f"does not fit the model: {wrong}")
        torch.Generator(device=device).set_state(tensors[RANDOM])
    except (RuntimeError, TypeError) as error:
        raise InputError("carry", str(path), f"is damaged: {error}") from None
    random = tensors.pop(RANDOM)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    span = Span(start=header["position"], carry=unpack(tensors), keep_carry=True)
    return Bookmark(span, tensors[LOGITS], random)


def _header(path: str | Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or "format" not in header:
        raise InputError("carry", str(path), "is no file that --carry-out wrote")
    if header["format"] != FORMAT:
        raise InputError("carry", str(path), f"is of format {header['format']!r}; this version reads {FORMAT}")
    position, names = header.get("position"), header.get("complex")
    if not isinstance(position, int) or not 1 <= position < 1 << 53 or not isinstance(names, list):
        raise InputError("carry", str(path), "is damaged: it does not hold what it must")
    return {"model": None, "sha256": None} | header


@torch.no_grad()
def _wrong(model: Model, tensors: Mapping[str, Tensor], position: int) -> str:
    """How tensors differ from those that the model leaves behind so many tokens, nothing if they do not.

    One token shows their names, types and sizes. Where tokens themselves are kept, there are as many as were read.
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
        grows = ".by_channel" in name and name in tensors and shape[1] == 1
        shape[1] = position if grows and tensors[name].shape[1:2] == (position,) else shape[1]
    found = {name: [*tensor.shape] for name, tensor in tensors.items() if name != RANDOM}
    odd = [name for name in expected if name in tensors and tensors[name].dtype != expected[name].dtype]
    odd += [] if RANDOM in tensors else [RANDOM]
    return differences(found, shapes) or ", ".join(f"{name} is missing or of another type" for name in odd)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _digest(tensors: Mapping[str, Tensor], found: Any) -> str:
    """Add names, types, shapes and bytes of tensors to a hash; returns its digest, hexadecimal."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), [*tensor.shape]]).encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    digest: str = found.hexdigest()
    return digest
