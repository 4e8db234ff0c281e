"""`longreach embed`: hidden states of files of any length, as an array."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import InputError
from ..arguments import add_device, add_model_directory, add_threads, check_output_file, device_of, threads_of

SUMMARY = "write hidden states of files of any length, for each token, window or document"
DESCRIPTION = """Write the hidden states of any layer for files of any length, in bounded memory: a row for each token,
for each window of tokens or for each document, as .npy or .safetensors, and beside it a .json file that says which rows
are of which document. A row of a causal model has seen all tokens of its document up to it."""
EXAMPLES = """
  longreach embed runs/quickstart my-texts --out texts.npy                 # a row for each document: the tokens' mean
  longreach embed runs/quickstart book.txt --out book.npy --per window --window 4096 --pool last
  longreach embed exported book.txt --out book.safetensors --per token --layer 1"""

PER, POOLS, FORMATS = ("token", "window", "document"), ("mean", "last"), (".npy", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach embed``."""
    add_model_directory(parser)
    source_help = "files and folders; each document that `pack` finds in them is read from its beginning to its end"
    parser.add_argument("source", metavar="SOURCE", nargs="+", help=source_help)
    out_help = "an array [rows, width] of fp32: .npy or .safetensors, by the ending of the name"
    parser.add_argument("--out", metavar="FILE", required=True, help=out_help)
    layer_help = "0 for the embedded tokens, N for the output of layer N, -N from the end; last, the default: of the "
    layer_help += "last layer"
    parser.add_argument("--layer", metavar="N", default="last", help=layer_help)
    per_help = "what a row is of (default document)"
    parser.add_argument("--per", choices=PER, default="document", help=per_help)
    pool_help = "the mean of the tokens of a window or document (the default), or the last one"
    parser.add_argument("--pool", choices=POOLS, help=pool_help)
    parser.add_argument("--window", type=int, metavar="N", default=0, help="tokens of a window")
    add_device(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the hidden states and print how many; returns the exit code."""
    layer = _check(arguments)
    threads = threads_of(arguments)
    from ...framework.data.tally import told
    from ...framework.inference.embed import embed
    from ...framework.runtime.process import set_num_threads

    set_num_threads(threads)
    found = embed(
        arguments.run_dir,
        arguments.source,
        arguments.out,
        layer=layer,
        per=arguments.per,
        pooling="last" if arguments.pool == "last" else "mean",
        window=arguments.window,
        device=device_of(arguments),
    )
    documents = f"{found.num_documents:,} document{'s' * (found.num_documents != 1)} of {found.num_tokens:,} tokens"
    print(f"{documents}: {found.num_rows:,} rows of {found.width:,} numbers in {arguments.out}")
    for line in told(found.counts):
        print(line)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Raise `InputError` for a mistake in the arguments; returns the number of the layer."""
    check_output_file("--out", arguments.out)
    if Path(arguments.out).suffix not in FORMATS:
        raise InputError("--out", arguments.out, f"a name that ends in {' or '.join(FORMATS)}")
    if arguments.pool and arguments.per == "token":
        raise InputError("--pool", arguments.pool, "only for --per window and document", "leave it out")
    if (arguments.per == "window") != (arguments.window > 0) or arguments.window < 0:
        allowed = "at least 1 token with --per window, and none without"
        raise InputError("--window", arguments.window, allowed, "for example --per window --window 4096")
    try:
        return -1 if arguments.layer == "last" else int(arguments.layer)
    except ValueError:
        raise InputError("--layer", arguments.layer, "a number, or last") from None
