"""`longreach distill`: from taps to a recurrence, a model whose learned long kernels are sums of damped modes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import InputError
from ..arguments import add_model_directory, add_threads, check_reports, threads_of, writing_reports

SUMMARY = "turn a model's learned long convolutions into recurrences, and export it"
DESCRIPTION = """From taps to a recurrence: fit each learned long kernel of a model's chela layers (free or decaying)
by N damped modes per channel, and export the model with these (chela.long_kernel=modal). It decodes at O(N) a token,
and its ranks exchange states. The error of a channel is over all distances, relative to its taps (RMS)."""
EXAMPLES = """
  longreach distill runs/chela-taps distilled --modes 16 --figure kernels.png
  longreach distill runs/chela-taps distilled --batches 4           # bits per byte, held-out, before and after
  longreach distill runs/chela-taps distilled --source book.txt     # the same of files
The other commands take what it writes as any export: longreach generate distilled --prompt "def main(".
An export is taken as a run is, unless held-out batches are scored."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach distill``."""
    add_model_directory(parser)
    out_help = "directory to create; an earlier export in it is replaced"
    parser.add_argument("out_dir", metavar="OUT_DIR", help=out_help)
    parser.add_argument("--modes", type=int, metavar="N", default=16, help="modes of each channel (default 16)")
    steps_help = "steps of the search for the decays and angles, of each layer (default 300)"
    parser.add_argument("--steps", type=int, metavar="N", default=300, help=steps_help)
    source_help = "score both models on these files and folders, as `longreach evaluate --source` does"
    parser.add_argument("--source", metavar="PATH", nargs="+", default=[], help=source_help)
    batches_help = "score both models on so many held-out batches of the run (default 0, none)"
    parser.add_argument("--batches", type=int, metavar="N", default=0, help=batches_help)
    parser.add_argument("--json", metavar="FILE", help="write the error of every channel, and the scores, as JSON")
    parser.add_argument("--figure", metavar="FILE.png", help="plot taps and modes of a few channels of each layer")
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export the model with modes, and print how near they are; returns the exit code."""
    _check(arguments)
    threads = threads_of(arguments)
    from ...framework.inference.distill import LayerFit, distill, plot, write_json
    from ...framework.runtime.process import set_num_threads

    set_num_threads(threads)
    modes = arguments.modes

    def tell(layer: LayerFit) -> None:
        errors, (width, taps) = layer.errors, layer.taps.shape
        print(
            f"{layer.name}: {taps:,} taps -> {modes} modes, {width:,} channels: relative error median "
            f"{errors.median():.3g}, worst {errors.max():.3g} (channel {int(errors.argmax())})",
            flush=True,
        )

    found = distill(
        arguments.run_dir,
        arguments.out_dir,
        modes,
        steps=arguments.steps,
        sources=arguments.source,
        max_batches=arguments.batches,
        progress=tell,
    )
    if found.before is not None and found.after is not None:
        before, after = (one.score.whole.bits_per_byte for one in (found.before, found.after))
        tokens, unit = found.before.score.whole.num_tokens, found.before.unit
        print(f"bits per {unit} of {tokens:,} tokens: {before:.4f} with taps, {after:.4f} with modes")
    with writing_reports():
        if arguments.json:
            write_json(found, Path(arguments.json))
        if arguments.figure:
            plot(found, Path(arguments.figure), arguments.run_dir)
    print(f"exported to {arguments.out_dir}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for a mistake in the arguments."""
    for option, least in (("modes", 1), ("steps", 0), ("batches", 0)):
        if getattr(arguments, option) < least:
            raise InputError(f"--{option}", getattr(arguments, option), f"at least {least}")
    if arguments.batches and arguments.source:
        raise InputError("--batches", arguments.batches, "for the run's held-out documents", "leave --source out")
    check_reports(arguments)
