"""`longreach generate`: continue a text, token by token."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ...errors import InputError
from ..arguments import add_device, add_model_directory, add_threads, check_output_file, device_of, threads_of
from ..exit_codes import INTERRUPTED, report_error

SUMMARY = "continue a text"
DESCRIPTION = """Continue a text with the newest model of a run, or with an exported model. Memory does not grow with
the length of the prompt, nor the time per token with its position (except with softmax attention)."""
EXAMPLES = """
  longreach generate runs/quickstart --prompt "def main(" --temperature 0.7 --top-p 0.95
  longreach generate runs/quickstart --prompt @book.txt --tokens 0 --carry-out book.carry    # read once,
  longreach generate runs/quickstart --carry-in book.carry --prompt "Then "                  # and continue from it"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``longreach generate``."""
    add_model_directory(parser)
    prompt_help = "text to continue; @FILE reads a file, @@TEXT is the text @TEXT; may be given several times: each "
    prompt_help += "prompt is continued by itself"
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=prompt_help)
    parser.add_argument("--tokens", type=int, default=256, help="number of tokens to generate (default 256)")
    temperature_help = "temperature of sampling; 0 takes the most likely token (default 0.8)"
    parser.add_argument("--temperature", type=float, default=0.8, help=temperature_help)
    top_k_help = "sample among the k most likely tokens; 0, the default: among all"
    parser.add_argument("--top-k", type=int, default=0, help=top_k_help)
    top_p_help = "sample among the fewest tokens whose probabilities add up to P; 1, the default: among all"
    parser.add_argument("--top-p", type=float, metavar="P", default=1.0, help=top_p_help)
    seed_help = "seed of the random numbers for sampling (default 0; with --carry-in, the default is to continue with "
    seed_help += "the random state saved in that file)"
    parser.add_argument("--seed", type=int, help=seed_help)
    out_help = "save the state after the prompt and the generated tokens"
    parser.add_argument("--carry-out", metavar="FILE", help=out_help)
    in_help = "continue from a state that --carry-out saved, as if there had been no stop; a prompt is read after it"
    parser.add_argument("--carry-in", metavar="FILE", help=in_help)
    add_device(parser)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the prompts and their continuations; returns the exit code."""
    _check(arguments)
    threads = threads_of(arguments)
    prompts = [_read_prompt(text) for text in arguments.prompt] or [b""]  # with --carry-in, a prompt may be missing
    from ...framework.data.progress import progress
    from ...framework.inference.generate import Decoder, continuations, decode_stream, encode
    from ...framework.inference.loading import load_run, vocabulary_of
    from ...framework.runtime.process import set_decoding_threads, set_num_threads

    _, model = load_run(arguments.run_dir, device=device_of(arguments))
    vocabulary = vocabulary_of(arguments.run_dir, model)
    encoded = [encode(prompt, vocabulary) if prompt else None for prompt in prompts]
    if arguments.carry_in:
        start = Decoder.load(model, arguments.carry_in, arguments.seed)
        if start.rows > 1:
            raise InputError("--carry-in", arguments.carry_in, f"one text, not {start.rows} side by side")
    else:
        start = Decoder(model, arguments.seed or 0)
    decoders = [start.fork() for _ in prompts]
    for decoder, ids in zip(decoders, encoded, strict=True):
        if ids is not None:
            set_num_threads(threads, ids.numel() * model.config.width)
            with progress("reading the prompt", ids.shape[1], unit="tokens") as advance:
                decoder.prefill(ids, advance)
    set_decoding_threads(threads, model)
    texts = continuations(
        decoders,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )
    for number, (prompt, ids, tokens) in enumerate(zip(prompts, encoded, texts, strict=True), 1):
        if len(prompts) > 1:
            sys.stdout.write(f"prompt {number} of {len(prompts)}:\n")
        sys.stdout.write(prompt.decode("utf-8", errors="replace") if len(prompt) <= 4096 else "...")
        with _interruption(bool(arguments.carry_out)) as interrupted:
            for text in decode_stream(
                _until(tokens, interrupted), vocabulary, ids, is_continuation=bool(arguments.carry_in)
            ):
                sys.stdout.write(text)
                sys.stdout.flush()
        sys.stdout.write("\n")
    if not arguments.carry_out:
        return 0
    decoders[0].save(arguments.carry_out)
    sys.stdout.flush()
    saved = f"interrupted; the state after these tokens is saved: --carry-in {arguments.carry_out} goes on from it"
    return report_error(saved, INTERRUPTED) if interrupted else 0


def _until(tokens: Iterator[int], interrupted: list[int]) -> Iterator[int]:
    for token in tokens:
        yield token
        if interrupted:
            return


@contextmanager
def _interruption(enabled: bool) -> Iterator[list[int]]:
    """Where ``enabled``, the first Ctrl-C within appends to the list, so that no token is left half read."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    if not enabled:
        yield received
        return
    before = signal.signal(signal.SIGINT, record)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _check(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for what is wrong before the model is loaded."""
    for name, value, low in (
        ("--tokens", arguments.tokens, 0 if arguments.carry_out else 1),
        ("--top-k", arguments.top_k, 0),
        ("--seed", arguments.seed or 0, 0),
    ):
        if not low <= value < 2**63:
            raise InputError(name, value, f"at least {low}, below 2^63")
    if not 0 <= arguments.temperature < math.inf:  # NaN is refused too
        raise InputError("--temperature", arguments.temperature, "a finite number, at least 0")
    if not 0 < arguments.top_p <= 1:
        raise InputError("--top-p", arguments.top_p, "more than 0, at most 1")
    if not arguments.prompt and not arguments.carry_in:
        allowed = "a text, or --carry-in to continue from a saved state"
        raise InputError("--prompt", None, allowed, "see longreach generate --help")
    if arguments.carry_out and len(arguments.prompt) > 1:
        raise InputError("--carry-out", arguments.carry_out, "with one --prompt only: there is one state to save")
    check_output_file("--carry-out", arguments.carry_out)


def _read_prompt(text: str) -> bytes:
    """The bytes of a ``--prompt``."""
    prompt = text.removeprefix("@").encode("utf-8", errors="surrogateescape")  # of @@TEXT
    if text.startswith("@") and not text.startswith("@@"):
        try:
            with open(text[1:], "rb") as file:
                prompt = file.read()
        except OSError as error:
            raise InputError("--prompt", text, f"cannot be read: {error.strerror}") from None
    if not prompt:
        raise InputError("--prompt", text, "at least one byte")
    return prompt
