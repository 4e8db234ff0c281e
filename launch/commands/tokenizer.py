"""`longreach tokenizer`: train a tokenizer."""

from __future__ import annotations

import argparse

from ..arguments import add_source, check_source

SUMMARY = "train a tokenizer on the documents that are not held out"
DESCRIPTION = """Train a byte-level BPE tokenizer on the documents that are not held out, for `pack --tokenizer` and
data.tokenizer."""
EXAMPLES = """
  longreach tokenizer my-texts mine.json --vocab 8192
Use it: longreach pack my-texts data/packed/tokens --tokenizer mine.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach tokenizer``."""
    add_source(parser)
    parser.add_argument("file", metavar="FILE", help="tokenizer.json to create")
    parser.add_argument("--vocab", type=int, metavar="N", default=8192, help="size of the vocabulary (default 8192)")


def run(arguments: argparse.Namespace) -> int:
    """Train a tokenizer and print its size; returns the exit code."""
    from ...framework.data.bpe import make_tokenizer
    from ...framework.data.tally import Tally, told

    check_source(arguments)
    tally = Tally()
    tokenizer = make_tokenizer(
        arguments.source,
        arguments.file,
        arguments.vocab,
        valid_fraction=arguments.valid_fraction,
        field=arguments.field,
        max_bad_samples=arguments.max_bad,
        binary=arguments.binary,
        tally=tally,
    )
    for line in told(tally.as_json()):
        print(line)
    print(f"{tokenizer.size:,} tokens: {arguments.file}")
    return 0
