"""The entry point of a training rank, which torchrun and deepspeed start: ``torchrun ... -m longreach.launch.train
CONFIG [key=value ...]``. The arguments are those of `longreach train`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from .arguments import Parser, parse
from .commands.train import add_arguments, run
from .exit_codes import INTERRUPTED, report_errors
from .process import exit_process, interrupt_once, prepare_libraries, stop_while_starting


def main(words: Sequence[str] | None = None) -> None:
    """Run ``longreach train`` as one rank, then end the process."""
    stop_while_starting()
    prepare_libraries()
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_run)(words)  # torchrun shows the traceback of the rank that failed first


def _run(words: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m longreach.launch.train", description=__doc__)
    add_arguments(parser)
    arguments = parse(parser, words)
    signal.signal(signal.SIGINT, interrupt_once)
    try:
        with report_errors() as outcome:
            outcome.exit_code = run(arguments)
    except KeyboardInterrupt:
        exit_process(INTERRUPTED)  # the process that started the ranks reports it
    exit_process(outcome.exit_code)


if __name__ == "__main__":
    main()
