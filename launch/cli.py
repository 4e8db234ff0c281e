"""The command line: ``longreach train | evaluate | generate | pack | tokenizer | export | bench | doctor |
completion``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import InputError
from . import train as train_command
from .examples import EXAMPLES

if TYPE_CHECKING:
    from ..framework.tasks import Score, Task


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 2 a user's mistake, told in one line)."""
    arguments = train_command.parse(_parser(), words)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return train_command.guarded(lambda: command(arguments))
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written goes nowhere
        return train_command.UNREAD
    except KeyboardInterrupt:
        return train_command.tell("interrupted", train_command.INTERRUPTED)


def program() -> NoReturn:
    """The program `longreach`."""
    train_command.leave(main())


def _parser() -> argparse.ArgumentParser:
    parser = train_command.Parser(
        prog="longreach",
        description="Train models on very long sequences, one sequence split over many ranks.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train as a config says", description=_TRAIN)
    train_command.add_arguments(train)
    train.set_defaults(command=train_command.run)

    evaluate_help = "bits per byte of held-out documents, or of files of any length; of a task, its test"
    evaluate = commands.add_parser("evaluate", help=evaluate_help, description=_EVALUATE)
    evaluate.add_argument(
        "run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart, or an export"
    )
    source_help = "score the documents that pack would find in these files and folders, each as one sequence"
    evaluate.add_argument("--source", metavar="PATH", nargs="+", default=[], help=source_help)
    document_help = "a table of documents; held-out ones are one sequence each too, from an empty past"
    evaluate.add_argument("--by-document", action="store_true", help=document_help)
    contexts_help = "score again with the past forgotten every so many tokens: does more context help?"
    evaluate.add_argument("--contexts", metavar="N,N", default="", help=contexts_help)
    evaluate.add_argument("--json", metavar="FILE", help="write all figures as JSON; of a task too")
    evaluate.add_argument("--figure", metavar="FILE.png", help="plot bits per byte by position, and by context")
    evaluate.add_argument("--batches", type=int, default=0, help="held-out batches to read; 0 reads all")
    overrides_help = "replaces a value of the run's config: data.seq_len=1048576, say"
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=overrides_help)
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser("generate", help="continue a text", description=_GENERATE)
    generate.add_argument(
        "run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart, or an export"
    )
    prompt_help = "text to continue; @FILE reads a file; several are continued side by side, each as if it were alone"
    generate.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=prompt_help)
    generate.add_argument("--tokens", type=int, default=256, help="how many to write (default 256)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; 0 among all")
    top_p_help = "draw among the fewest tokens that make up this probability; 1 among all"
    generate.add_argument("--top-p", type=float, metavar="P", default=1.0, help=top_p_help)
    generate.add_argument("--seed", type=int, help="of the draws (default 0, or those of --carry-in go on)")
    generate.add_argument("--carry-out", metavar="FILE", help="save the state after all that was read and written")
    generate.add_argument("--carry-in", metavar="FILE", help="go on from such a state, as if nothing had been between")
    generate.set_defaults(command=_generate)

    pack_help = "write a corpus as WebDataset shards with an index"
    pack = commands.add_parser("pack", help=pack_help, description=_PACK)
    _add_source(pack)
    out_help = "directory to be made, for data.source=OUT_DIR; one that holds just that is kept"
    pack.add_argument("out_dir", metavar="OUT_DIR", help=out_help)
    pack.add_argument("--name", default="", help="what the corpus is called (default: the source's name)")
    pack.add_argument("--tokenizer", metavar="FILE", default="", help="pack tokens of this tokenizer.json, not bytes")
    vocab_help = "train a tokenizer of N tokens and pack those; of .npy arrays, what their ids are below"
    pack.add_argument("--vocab", type=int, metavar="N", default=0, help=vocab_help)
    pack.set_defaults(command=_pack)

    tokenizer_help = "train a tokenizer on the documents that are not held out"
    tokenizer = commands.add_parser("tokenizer", help=tokenizer_help, description=_TOKENIZER)
    _add_source(tokenizer)
    tokenizer.add_argument("file", metavar="FILE", help="tokenizer.json to be made")
    tokenizer.add_argument("--vocab", type=int, metavar="N", default=8192, help="how many tokens (8192)")
    tokenizer.set_defaults(command=_tokenizer)

    export_help = "write a run's newest model as safetensors, to be loaded anywhere"
    export = commands.add_parser("export", help=export_help, description=_EXPORT)
    export.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    export.add_argument("out_dir", metavar="OUT_DIR", help="directory to be made; an earlier export is replaced")
    export.set_defaults(command=_export)

    bench = commands.add_parser(
        "bench",
        help="check and measure on this machine: kernels, memory, parallel or decode",
        description=_BENCH,
    )
    bench.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="kernels",
        choices=list(_BENCH_OPTIONS),
        help=", ".join(_BENCH_OPTIONS),
    )
    out_help = "where the results go (default: benchmarks/results, below the working directory)"
    bench.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=out_help)
    bench.add_argument("--threads", type=int, help="processor threads (default 0: all; decode: 1; not parallel)")
    bench.add_argument("--longest", type=int, help="tokens up to which it measures (default 2^20; not parallel)")
    bench.add_argument("--seconds", type=float, help="memory: what a step that is not streamed may take (300)")
    bench.add_argument(
        "--memory-gib", type=float, help="memory: and its resident memory (12); decode: that of the past of softmax (4)"
    )
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="check this machine before a job", description=_DOCTOR)
    doctor.add_argument("directory", metavar="DIR", nargs="?", default=".", help="that takes the runs (default: this)")
    doctor.add_argument("--json", metavar="FILE", help="also append the findings to a file, as one line")
    doctor.set_defaults(command=_doctor)

    completion_help = "print what a shell needs to complete these commands"
    completion = commands.add_parser("completion", help=completion_help, description=_COMPLETION)
    completion.add_argument("shell", metavar="SHELL", choices=["bash", "zsh"], help="bash or zsh")
    completion.set_defaults(command=_completion)

    for name, command in commands.choices.items():
        command.set_defaults(parser=command)
        if name in EXAMPLES:
            command.epilog = f"examples:{EXAMPLES[name]}"
            command.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    """What is read, and which of it; for `pack` and `tokenizer`."""
    source_help = "a file or folder of text, JSONL, FASTA or .npy ids, tar shards, or cpython for Python's own library"
    parser.add_argument("source", metavar="SOURCE", help=source_help)
    parser.add_argument("--valid-fraction", type=float, default=0.05, help="part of the documents held out (0.05)")
    parser.add_argument("--field", default="text", metavar="NAME", help="of a line of JSONL that holds the text (text)")
    parser.add_argument("--max-bad", type=int, metavar="N", default=0, help="leave out up to N bad documents (0)")


_TRAIN = """Train as CONFIG says. Starts parallel.ranks local ranks itself; under torchrun or deepspeed
(`torchrun ... -m longreach.launch.train CONFIG`) it joins the world that they started."""

_EVALUATE = """Score the newest model of a run by what was held out from it, or by other files (--source). The run of
a task (docs/tasks.md) is scored by the task's test: then only --json and key=value may be given."""

_GENERATE = """Continue a text with the newest model of a run, or with an export. Memory does not grow with the prompt,
nor the time of a token with its position (softmax excepted)."""

_PACK = """Write a corpus as WebDataset shards with an index, split into what is trained on and what is held out.
`longreach train` does so by itself; this shows the figures before, and packs once for many nodes."""

_TOKENIZER = """Train a byte-level BPE tokenizer on the documents that are not held out, for `pack --tokenizer` and
data.tokenizer."""

_EXPORT = """Write the newest model of a run as model.safetensors and config.json, which need neither the run nor
DeepSpeed to be loaded."""

_DOCTOR = """Check this machine before a job: backends, versions, interfaces, rendezvous, speeds of memory, disk and
exchange, limits. A line marked `bad` says what would stop a job, and what to do; the exit code is then 1."""

_COMPLETION = """Print what bash or zsh needs to complete commands, options, configs and runs."""

_BENCH = """Measure on this machine: a table, a JSON and a plot, with machine, commit and date. NAME is one of

  kernels   checks the operators, then times them against what bounds them and what they replace (the default)
  memory    peak memory of a training step against the sequence's length: softmax, whole, and streamed in blocks
  parallel  ranks on gloo: training speed of two against one, and the bytes and time that a layer exchanges, beside
            DeepSpeed's Ulysses and ring attention
  decode    tokens a second and bytes of state against the position, beside softmax attention with its cache"""
_BENCH_OPTIONS: dict[str, dict[str, int]] = {  # the options of each, and their least values
    "kernels": {"threads": 0, "longest": 16_384},
    "memory": {"threads": 0, "longest": 1, "seconds": 1, "memory_gib": 0},
    "parallel": {},
    "decode": {"threads": 0, "longest": 4096, "memory_gib": 0},
}


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.batches < 0:
        raise InputError("--batches", arguments.batches, "at least 0")
    if arguments.batches and (arguments.source or arguments.by_document):
        raise InputError("--batches", arguments.batches, "for the windows that training validates with", "leave it out")
    contexts = _contexts(arguments.contexts)
    for option in ("json", "figure"):
        _check_file(f"--{option}", getattr(arguments, option))
    if arguments.figure and Path(arguments.figure).suffix != ".png":
        raise InputError("--figure", arguments.figure, "a name that ends in .png")
    from ..framework.inference.evaluate import evaluate, evaluate_task, has_test, plot, write_json

    if has_test(arguments.run_dir):
        if arguments.source or arguments.by_document or contexts or arguments.batches or arguments.figure:
            allowed = "is of a task: only --json and key=value say how it is scored"
            raise InputError("RUN_DIR", arguments.run_dir, allowed)
        return _evaluate_task(*evaluate_task(arguments.run_dir, arguments.overrides), arguments.json)
    found = evaluate(
        arguments.run_dir,
        arguments.source,
        overrides=arguments.overrides,
        by_document=arguments.by_document,
        max_batches=arguments.batches,
        contexts=contexts,
    )
    whole = found.score.whole
    print(
        f"{whole.num_tokens:,} tokens: {whole.loss:.4f} nats, {whole.bits_per_byte:.4f} bits per {found.unit}, "
        f"perplexity {whole.perplexity:.3f}"
    )
    print(f"from position{f'bits per {found.unit}':>16}   standard error       tokens")
    for one in found.score.by_position:
        error = "-" if math.isnan(one.error) else f"{found.bits(one.error):.4f}"  # of a single sequence there is none
        print(f"{one.first:13,}{found.bits(one.loss):16.4f}{error:>17}{one.num_tokens:13,}")
    if found.by_context:
        print(f"past forgotten every{f'bits per {found.unit}':>16}")
        for context, figure in found.by_context:
            print(f"{context:13,} tokens{figure.bits_per_byte:16.4f}")
        print(f"{'never':>20}{whole.bits_per_byte:16.4f}")
    if arguments.by_document:
        print(f"       tokens      nats{f'bits per {found.unit}':>16}   perplexity   document")
        for name, figure in found.score.documents:
            words = f"{figure.loss:10.4f}{figure.bits_per_byte:16.4f}{figure.perplexity:13.3f}"
            print(f"{figure.num_tokens:13,}{words}   {name if name.isprintable() else ascii(name)}")
    try:
        if arguments.json:
            write_json(found, Path(arguments.json))
        if arguments.figure:
            plot(found, Path(arguments.figure), arguments.run_dir)
    except OSError as error:
        raise InputError("--json or --figure", error.filename, f"cannot be written: {error.strerror}") from None
    return 0


def _evaluate_task(task: Task, found: Score | None, json_file: str | None) -> int:
    if found is None:
        raise InputError("data", task.title, "an example to be scored")
    print(f"{task.title}: {found.num_labels:,} answers, loss {found.loss:.4f}")
    for name, value in found.metrics.items():
        print(f"{name:>12}{value:10.4f}   (the simplest answer: {task.baseline_metrics[name]:.4f})")
    if json_file:
        Path(json_file).write_text(json.dumps({**asdict(found), "chance": task.baseline_metrics}, indent=2) + "\n")
    return 0


def _contexts(text: str) -> list[int]:
    """The numbers of ``--contexts``."""
    try:
        found = [int(word) for word in text.split(",") if word]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise InputError("--contexts", text, "numbers of tokens, at least 1", "for example 256,1024,4096")
    return found


def _check_file(option: str, path: str | None) -> None:
    """Raise `InputError` unless a file can be made there."""
    if path is not None:
        place = Path(path)
        if (place.exists() and not place.is_file()) or not place.parent.is_dir():
            raise InputError(option, path, "a file in a directory that exists")


def _generate(arguments: argparse.Namespace) -> int:
    _check_generate(arguments)
    prompts = [_prompt(text) for text in arguments.prompt] or [b""]  # nothing more to read
    from ..framework.data import load_vocabulary
    from ..framework.data.progress import progress
    from ..framework.inference.generate import Decoder, continuations, decode_stream, encode, load_run

    _, model = load_run(arguments.run_dir)
    vocabulary = load_vocabulary(arguments.run_dir)
    read = [encode(prompt, vocabulary) if prompt else None for prompt in prompts]
    if arguments.carry_in:
        start = Decoder.load(model, arguments.carry_in, arguments.seed)
        if start.rows > 1:
            raise InputError("--carry-in", arguments.carry_in, f"one text, not {start.rows} side by side")
    else:
        start = Decoder(model, arguments.seed or 0)
    decoders = [start.fork() for _ in prompts]
    for decoder, given in zip(decoders, read, strict=True):
        if given is not None:
            with progress("reading the prompt", given.shape[1], unit="tokens") as advance:
                decoder.read(given, advance)
    texts = continuations(
        decoders,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )
    for number, (prompt, given, tokens) in enumerate(zip(prompts, read, texts, strict=True), 1):
        if len(prompts) > 1:
            sys.stdout.write(f"prompt {number} of {len(prompts)}:\n")
        sys.stdout.write(prompt.decode("utf-8", errors="replace") if len(prompt) <= 4096 else "...")
        for text in decode_stream(tokens, vocabulary, given, goes_on=bool(arguments.carry_in)):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    if arguments.carry_out:
        decoders[0].save(arguments.carry_out)
    return 0


def _check_generate(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for what is wrong before the model is loaded."""
    for name, value, low in (
        ("--tokens", arguments.tokens, 0 if arguments.carry_out else 1),
        ("--top-k", arguments.top_k, 0),
        ("--seed", arguments.seed or 0, 0),
        ("--temperature", arguments.temperature, 0),
    ):
        if not low <= value < 2**63:  # NaN is not either
            raise InputError(name, value, f"at least {low}")
    if not 0 < arguments.top_p <= 1:
        raise InputError("--top-p", arguments.top_p, "more than 0, at most 1")
    if not arguments.prompt and not arguments.carry_in:
        raise InputError("--prompt", None, "a text, or --carry-in to go on with one", "see longreach generate --help")
    if arguments.carry_out and len(arguments.prompt) > 1:
        raise InputError("--carry-out", arguments.carry_out, "one --prompt at a time has a state to save")
    _check_file("--carry-out", arguments.carry_out)


def _prompt(text: str) -> bytes:
    prompt = text.encode("utf-8", errors="surrogateescape")
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                prompt = file.read()
        except OSError as error:
            raise InputError("--prompt", text, f"cannot be read: {error.strerror}") from None
    if not prompt:
        raise InputError("--prompt", text, "at least one byte")
    return prompt


def _pack(arguments: argparse.Namespace) -> int:
    from ..framework.data import BASELINES, DataConfig, packed_dir, prepare

    _check_source(arguments)
    data = DataConfig(
        source=arguments.source,
        name=arguments.name,
        tokenizer=arguments.tokenizer,
        vocab=arguments.vocab,
        field=arguments.field,
        cache=arguments.out_dir,
        valid_fraction=arguments.valid_fraction,
        max_bad_samples=arguments.max_bad,
        seq_len=1,
        batch_size=1,
    )
    if packed_dir(data) != Path(arguments.out_dir).expanduser():
        raise InputError("SOURCE", arguments.source, "is packed already", f"train with data.source={arguments.source}")
    index = prepare(data)
    for name, split in index.splits.items():
        num_bytes = f" of {split.num_bytes:,} bytes" if split.num_bytes not in (0, split.num_tokens) else ""
        counts = f"{split.num_documents:,} documents, {split.num_tokens:,} tokens{num_bytes}"
        print(f"{name}: {counts}, {len(split.shards)} shards")
    if num_bad := index.source.get("num_bad_samples"):
        print(f"left out: {num_bad} bad samples")
    for key, label in BASELINES.items():
        if key in index.baselines:
            print(f"valid, {label}: {index.baselines[key]:.3f} bits per byte")
    print(f"packed into {index.directory}")
    return 0


def _tokenizer(arguments: argparse.Namespace) -> int:
    from ..framework.data.bpe import make_tokenizer

    _check_source(arguments)
    made = make_tokenizer(
        arguments.source,
        arguments.file,
        arguments.vocab,
        valid_fraction=arguments.valid_fraction,
        field=arguments.field,
        max_bad_samples=arguments.max_bad,
    )
    print(f"{made.size:,} tokens: {arguments.file}")
    return 0


def _check_source(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for the options of `_add_source`."""
    if not 0 <= arguments.valid_fraction < 1:
        raise InputError("--valid-fraction", arguments.valid_fraction, "from 0 to less than 1")
    if arguments.max_bad < 0:
        raise InputError("--max-bad", arguments.max_bad, "at least 0")


def _export(arguments: argparse.Namespace) -> int:
    from ..framework.inference.export import export

    model, step = export(arguments.run_dir, arguments.out_dir)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"step {step}, {num_parameters:,} parameters: exported to {arguments.out_dir}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {}
    for name in sorted(set().union(*_BENCH_OPTIONS.values())):
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if name not in _BENCH_OPTIONS[arguments.name]:
            raise InputError(option, value, f"an option that `bench {arguments.name}` does not have", "leave it out")
        low = _BENCH_OPTIONS[arguments.name][name]
        if not value >= low:  # NaN is not either
            raise InputError(option, value, f"at least {low}")
        options[name] = value
    if arguments.name == "memory":
        from .bench.memory import memory

        return memory(arguments.out, **options)
    if arguments.name == "parallel":
        from .bench.parallel import parallel

        return parallel(arguments.out, **options)
    if arguments.name == "decode":
        from .bench.decode import decode

        return decode(arguments.out, **options)
    from .bench.kernels import kernels

    return kernels(arguments.out, **options)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(arguments.directory, arguments.json)


def _completion(arguments: argparse.Namespace) -> int:
    from .completion import script

    print(script(_parser(), arguments.shell))
    return 0
