"""The command line: ``longreach train | evaluate | generate | pack | export | bench | doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..kernels.errors import InputError
from . import train as train_command


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 2 a user's mistake, told in one line)."""
    arguments = train_command.parse(_parser(), words)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return train_command.guarded(lambda: command(arguments))
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is said of it at exit
        return 141
    except KeyboardInterrupt:
        return train_command.tell("interrupted", train_command.INTERRUPTED)


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

    evaluate = commands.add_parser("evaluate", help="bits per byte of held-out documents, or of a file of any length")
    evaluate.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    evaluate.add_argument("--source", metavar="FILE", help="score this file as one sequence")
    evaluate.add_argument("--batches", type=int, default=0, help="held-out batches to read; 0 reads all")
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    prompt_help = "text to continue; @FILE reads a file; several are continued in turn, each as if it were alone"
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

    pack = commands.add_parser("pack", help="write a corpus as WebDataset shards with an index")
    pack.add_argument(
        "source", metavar="SOURCE", help="a file, a folder, tar shards, or cpython for this Python's own library"
    )
    pack.add_argument("out_dir", metavar="OUT_DIR")
    pack.add_argument("--name", default="", help="what the corpus is called (default: the source's name)")
    pack.add_argument("--valid-fraction", type=float, default=0.05, help="part of the documents held out (0.05)")
    pack.add_argument("--max-bad", type=int, metavar="N", default=0, help="leave out up to N bad samples of shards (0)")
    pack.set_defaults(command=_pack)

    export = commands.add_parser("export", help="write a run's newest model as safetensors, to be loaded anywhere")
    export.add_argument("run_dir", metavar="RUN_DIR", help="directory of a run, such as runs/quickstart")
    export.add_argument("out_dir", metavar="OUT_DIR", help="directory to be made; an earlier export is replaced")
    export.set_defaults(command=_export)

    bench = commands.add_parser(
        "bench",
        help="check and measure on this machine: kernels, memory or parallel",
        description=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="kernels",
        choices=list(_BENCH_OPTIONS),
        help=", ".join(_BENCH_OPTIONS),
    )
    bench.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the results go")
    bench.add_argument("--threads", type=int, help="kernels, memory: processor threads; 0, the default, takes all")
    bench.add_argument("--longest", type=int, help="kernels, memory: tokens up to which it measures (default 2^20)")
    bench.add_argument("--seconds", type=float, help="memory: what a step that is not streamed may take (300)")
    bench.add_argument("--memory-gib", type=float, help="memory: and its resident memory (12)")
    bench.set_defaults(command=_bench)

    doctor = commands.add_parser("doctor", help="check this machine before a job")
    doctor.set_defaults(command=_doctor)
    return parser


_TRAIN = """Train as CONFIG says. Starts parallel.ranks local ranks itself; under torchrun or deepspeed
(`torchrun ... -m longreach.launch.train CONFIG`) it joins the world that they started."""

_BENCH = """Measure on this machine: a table, a JSON and a plot, with machine, commit and date. NAME is one of

  kernels   checks the operators, then times them against what bounds them and what they replace (the default)
  memory    peak memory of a training step against the sequence's length: softmax, whole, and streamed in blocks
  parallel  ranks on gloo: training speed of two against one, and the bytes and time that a layer exchanges, beside
            DeepSpeed's Ulysses and ring attention"""
_BENCH_OPTIONS: dict[str, dict[str, int]] = {  # the options of each, and their least values
    "kernels": {"threads": 0, "longest": 16_384},
    "memory": {"threads": 0, "longest": 1, "seconds": 1, "memory_gib": 0},
    "parallel": {},
}


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..framework.evaluate import evaluate

    if arguments.batches < 0:
        raise InputError("--batches", arguments.batches, "at least 0")
    score = evaluate(arguments.run_dir, arguments.source, arguments.batches)
    print(f"{score.num_tokens:,} tokens: {score.loss:.4f} nats, {score.bits_per_token:.4f} bits per token")
    print("from position   bits per token")
    for position, loss in score.by_position:
        print(f"{position:13,}   {loss / score.loss * score.bits_per_token:.4f}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    _check_generate(arguments)
    prompts = [_prompt(text) for text in arguments.prompt] or [b""]  # nothing more to read
    from ..framework.data.progress import progress
    from ..framework.generate import Decoder, decode_stream, encode, load_run

    _, model = load_run(arguments.run_dir)
    if arguments.carry_in:
        start = Decoder.load(model, arguments.carry_in, arguments.seed)
        if start.rows > 1:
            raise InputError("--carry-in", arguments.carry_in, f"one text, not {start.rows} side by side")
    else:
        start = Decoder(model, arguments.seed or 0)
    for number, prompt in enumerate(prompts, 1):
        decoder = start.fork()
        if prompt:
            with progress("reading the prompt", len(prompt)) as advance:
                decoder.read(encode(prompt), advance)
        if len(prompts) > 1:
            sys.stdout.write(f"prompt {number} of {len(prompts)}:\n")
        sys.stdout.write(prompt.decode("utf-8", errors="replace") if len(prompt) <= 4096 else "...")
        tokens = decoder.write(
            arguments.tokens, temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
        )
        for text in decode_stream(int(token) for token in tokens):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        if arguments.carry_out:
            decoder.save(arguments.carry_out)
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
    if arguments.carry_out:
        if len(arguments.prompt) > 1:
            raise InputError("--carry-out", arguments.carry_out, "one --prompt at a time has a state to save")
        place = Path(arguments.carry_out)
        if (place.exists() and not place.is_file()) or not place.parent.is_dir():
            raise InputError("--carry-out", arguments.carry_out, "a file in a directory that exists")


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

    if not 0 <= arguments.valid_fraction < 1:
        raise InputError("--valid-fraction", arguments.valid_fraction, "from 0 to less than 1")
    if arguments.max_bad < 0:
        raise InputError("--max-bad", arguments.max_bad, "at least 0")
    data = DataConfig(
        source=arguments.source,
        name=arguments.name,
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
        print(f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, {len(split.shards)} shards")
    if num_bad := index.source.get("num_bad_samples"):
        print(f"left out: {num_bad} bad samples")
    for key, label in BASELINES.items():
        if key in index.baselines:
            print(f"valid, {label}: {index.baselines[key]:.3f} bits per byte")
    print(f"packed into {index.directory}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ..framework.export import export

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
    from .bench.kernels import kernels

    return kernels(arguments.out, **options)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()
