"""From taps to a recurrence: each learned long convolution of a model becomes the nearest one of N damped modes.

The model with modes decodes at O(N) a token, and its ranks exchange states instead of tokens. The current token's tap
is kept exactly, by the skip connection; the taps of the past are fitted by `fit_modes`. All other weights stay.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.modal_conv import modal_kernel
from ...kernels.modal_conv.fit import fit_modes, squared_error
from ..mixers.chela import Chela, ModalKernel, TapKernel
from ..model import Model, SequenceModel
from ..tasks import TaskDescription
from .evaluate import Evaluation, evaluate
from .export import check_replaceable, description_of, write_export
from .loading import CONFIG, is_foreign, load_exported, load_step, read_export_config, vocabulary_of

CHANNELS = 3  # of a layer that a figure shows: those of the smallest, the median and the largest error


@dataclass(frozen=True)
class LayerFit:
    """How near the modes of a layer are to its taps.

    Attributes:
        name: of the mixer.
        taps: ``[D, K]`` fp32, the learned kernel, the current token's tap first.
        fitted: ``[D, 2K]`` fp32, the modes' kernel, with the skip's part of the current token.
        errors: ``[D]`` fp32, the error of each channel over all distances, relative to its taps (RMS).
    """

    name: str
    taps: Tensor
    fitted: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Distillation:
    """The result of `distill`.

    Attributes:
        layers: the fits, in the order of the layers.
        before, after: the scores of both models on the same documents; None where none were named.
    """

    layers: list[LayerFit]
    before: Evaluation | None = None
    after: Evaluation | None = None

    def as_json(self) -> dict[str, object]:
        scores = {"before": self.before, "after": self.after}
        return {
            "layers": [{"name": layer.name, "errors": layer.errors.tolist()} for layer in self.layers],
            **{name: found.as_json() for name, found in scores.items() if found is not None},
        }


def distill(
    place: str | Path,
    out_dir: str | Path,
    modes: int = 16,
    *,
    steps: int = 300,
    sources: Sequence[str] = (),
    max_batches: int = 0,
    progress: Callable[[LayerFit], None] | None = None,
) -> Distillation:
    """Write an export of a model in which every learned long kernel is a sum of N damped modes.

    Args:
        place: directory of a run, whose newest checkpoint is taken, or of an export.
        out_dir: is created, as by `export.export`.
        modes: N, of each channel.
        steps: of the search for the poles, of each layer.
        sources: files and folders on which both models are scored, as by `evaluate.evaluate`.
        max_batches: held-out batches of the run on which they are scored, where no files are named; 0 for none.
        progress: called with each layer's fit.

    Raises:
        InputError: the model has no learned long kernel, or tokens see later ones; ``modes`` or ``steps`` is out of
            range; or a directory is not what it should be.
    """
    for option, value, least in (("modes", modes, 1), ("steps", steps, 0)):
        if value < least:
            raise InputError(option, value, f"at least {least}")
    target = Path(os.path.realpath(out_dir))
    check_replaceable(target, out_dir)
    if (Path(place) / CONFIG).is_file():
        model, step, task = _exported(Path(place))
    else:
        config, model, step = load_step(place)
        task = description_of(Path(place), config)
    _check(place, model)
    found, layers = with_modes(model, modes, steps, progress)
    before = after = None
    if sources or max_batches:
        cpu = torch.device("cpu")
        before, after = (
            evaluate(place, sources, max_batches=max_batches, device=cpu, model=one) for one in (model, found)
        )
    write_export(found, out_dir, step=step, vocabulary=vocabulary_of(place, model), task=task)
    return Distillation(layers, before, after)


def with_modes(
    model: SequenceModel, modes: int, steps: int = 300, progress: Callable[[LayerFit], None] | None = None
) -> tuple[Model, list[LayerFit]]:
    """A copy of a model of ours with `ModalKernel` in the place of each `TapKernel`, in evaluation mode; and the fits.

    Args:
        model: causal, with `chela` layers of learned taps.
        modes, steps, progress: as of `distill`.
    """
    config, fits = copy.deepcopy(model.config), []
    config.chela.long_kernel, config.chela.modes = "modal", modes
    with torch.random.fork_rng(devices=()):  # the caller's random generator does not advance
        found = Model(config)
    kept = {name: value for name, value in model.state_dict().items() if not name.endswith(".long.points")}
    found.load_state_dict(kept, strict=False)
    modules = dict(found.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Chela) and isinstance(module.long, TapKernel):
            replaced = modules[f"{name}.long"]
            assert isinstance(replaced, ModalKernel)
            fits.append(fit(name, module.long, replaced, steps))
            if progress is not None:
                progress(fits[-1])
    return found.eval(), fits


@torch.no_grad()
def fit(name: str, learned: TapKernel, replaced: ModalKernel, steps: int = 300) -> LayerFit:
    """Set the parameters of ``replaced`` so that its kernel, with its skip, is nearest to that of ``learned``.

    Args:
        name: of the layer.
        learned: a causal kernel of K taps.
        replaced: of as many channels.
        steps: as of `distill`.
    """
    taps = torch.nn.functional.pad(learned.kernel().detach(), (0, max(0, 3 - learned.taps)))
    past = taps[:, 1:]
    log_decay, angle, re, im = fit_modes(past, replaced.log_decay.shape[1], steps)
    # Of the past's taps the first is at m = 0; in the kernel it is at m = 1: c lambda = what was found.
    amplitude = torch.complex(re, im) / torch.exp(torch.complex(-log_decay.exp(), angle))
    for parameter, value in (
        (replaced.log_decay, log_decay),
        (replaced.angle, angle),
        (replaced.real, amplitude.real.unsqueeze(0)),
        (replaced.imag, amplitude.imag.unsqueeze(0)),
    ):
        parameter.copy_(value)
    whole = modal_kernel(*_parameters(replaced), length=2 * taps.shape[1])
    rest = (taps[:, 0] - whole[:, 0]).float()
    replaced.skip.copy_(learned.skip + rest)
    whole[:, 0] += rest
    written = torch.complex(replaced.real[0].double(), replaced.imag[0].double())
    shifted = written * torch.exp(torch.complex(-replaced.log_decay.double().exp(), replaced.angle.double()))
    error = squared_error(past, replaced.log_decay, replaced.angle, shifted.real, shifted.imag).sqrt()
    errors = error / taps.double().norm(dim=1).clamp(min=1e-30)
    return LayerFit(name, taps.float(), whole.float(), errors.float())


def plot(found: Distillation, path: Path, title: str) -> None:
    """Plot the taps and the modes' kernels of a few channels of each layer; writes a PNG, OSError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * CHANNELS, 2.2 * len(found.layers)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(found.layers), CHANNELS, squeeze=False)
    for row, layer in zip(panels, found.layers, strict=True):
        order = layer.errors.argsort().tolist()
        for axes, channel in zip(row, (order[0], order[len(order) // 2], order[-1]), strict=True):
            for kernel, label, style in ((layer.taps, "taps", "-"), (layer.fitted, "modes", "--")):
                axes.plot(range(1, kernel.shape[1] + 1), kernel[channel], style, lw=0.8, label=label)
            axes.set_title(f"{layer.name}, channel {channel}: error {layer.errors[channel]:.3g}", fontsize=8)
            axes.set(xscale="log", xlabel="1 + tokens back")
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def write_json(found: Distillation, path: Path) -> None:
    """Write the errors of all channels, and the scores, as JSON; OSError if that is not possible."""
    path.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


def _parameters(kernel: ModalKernel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a causal kernel, each ``[D, N]`` fp64."""
    found = kernel.log_decay, kernel.angle, kernel.real[0], kernel.imag[0]
    log_decay, angle, real, imag = (one.double() for one in found)
    return log_decay, angle, real, imag


def _exported(place: Path) -> tuple[SequenceModel, int, TaskDescription | None]:
    """The model of an export, its step and its task."""
    if is_foreign(place):
        raise InputError("RUN_DIR", str(place), "is a model of transformers, whose layers are not ours")
    model = load_exported(place)
    return model, read_export_config(place / CONFIG).step, model.task


def _check(place: str | Path, model: SequenceModel) -> None:
    """Raise `InputError` unless a model has learned kernels of which each is a recurrence from the left."""
    if not any(isinstance(module, TapKernel) for module in model.modules()):
        allowed = "has no chela layer whose long kernel is of learned taps"
        fix = "longreach train chela-taps trains one; a modal kernel is a recurrence already"
        raise InputError("RUN_DIR", str(place), allowed, fix)
    if not model.config.causal:
        allowed = "true: the taps of a centred kernel are of later tokens too, which no recurrence from the left has"
        raise InputError("model.causal", False, allowed)
