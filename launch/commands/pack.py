"""`longreach pack`: write a corpus as WebDataset shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import InputError
from ..arguments import add_source, check_source

SUMMARY = "write a corpus as WebDataset shards with an index"
DESCRIPTION = """Write a corpus as WebDataset shards with an index, split into documents to train on and documents
that are held out. `longreach train` does so by itself; this shows the sizes before, and packs once for many nodes."""
EXAMPLES = """
  longreach pack my-texts data/packed/mine
  longreach pack shards.tar data/packed/shards --valid-fraction 0.01 --max-bad 10
Train on it: longreach train quickstart data.source=data/packed/mine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach pack``."""
    add_source(parser)
    out_help = "directory to create, then used as data.source=OUT_DIR; where it already holds this corpus, packed with "
    out_help += "the same options, it is not packed again"
    parser.add_argument("out_dir", metavar="OUT_DIR", help=out_help)
    parser.add_argument("--name", default="", help="name of the corpus (default: that of SOURCE)")
    tokenizer_help = "pack the tokens of this tokenizer.json instead of bytes; of .npy arrays, the tokenizer that they "
    tokenizer_help += "were made with"
    parser.add_argument("--tokenizer", metavar="FILE", default="", help=tokenizer_help)
    vocab_help = "size of the vocabulary: train a tokenizer of N tokens on SOURCE and pack its tokens; of .npy arrays, "
    vocab_help += "every id must be less than N"
    mask_help = "letters that are out of the loss, in either case, such as N in a genome; they stay context"
    parser.add_argument("--mask", metavar="LETTERS", default="", help=mask_help)
    case_help = (
        "lower-case (soft-masked) letters of FASTA: make them capitals, keep them, or keep them out of the loss "
    )
    case_help += "too (default upper)"
    parser.add_argument("--case", choices=("upper", "keep", "mask"), default="upper", help=case_help)
    parser.add_argument("--vocab", type=int, metavar="N", default=0, help=vocab_help)


def run(arguments: argparse.Namespace) -> int:
    """Pack a corpus and print its sizes; returns the exit code."""
    from ...framework.data import BASELINES, DataConfig, packed_dir, prepare
    from ...framework.data.tally import told

    check_source(arguments)
    data = DataConfig(
        source=arguments.source,
        name=arguments.name,
        tokenizer=arguments.tokenizer,
        vocab=arguments.vocab,
        field=arguments.field,
        cache=arguments.out_dir,
        valid_fraction=arguments.valid_fraction,
        max_bad_samples=arguments.max_bad,
        binary=arguments.binary,
        mask=arguments.mask,
        case=arguments.case,
        seq_len=1,
        batch_size=1,
    )
    if packed_dir(data) != Path(arguments.out_dir).expanduser():
        raise InputError("SOURCE", arguments.source, "is packed already", f"train with data.source={arguments.source}")
    index = prepare(data)
    for name, split in index.splits.items():
        masked = f", {split.num_masked:,} of them out of the loss" * bool(index.masked)
        is_size = split.num_bytes in (0, split.num_tokens - split.num_masked)
        num_bytes = "" if is_size else f" of {split.num_bytes:,} bytes"
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens{masked}{num_bytes}"
        print(f"{name}: {counts}, {len(split.shards)} shards")
    for line in told(index.source.get("counts", {})):
        print(line)
    size = index.vocabulary["size"]
    print(f"vocabulary: {size:,} {index.vocabulary['kind']}, the rows of a model's table (model.vocab)")
    for key, label in BASELINES.items():
        if key in index.baselines:
            print(f"valid, {label}: {index.baselines[key]:.3f} bits per byte")
    print(f"packed into {index.directory}")
    return 0
