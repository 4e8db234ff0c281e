"""What ``longreach COMMAND --help`` shows below the options."""

from __future__ import annotations

EXAMPLES = {
    "train": """
  longreach train quickstart
  longreach train quickstart data.source=my-texts train.steps=1000 run.dir=runs/mine
  longreach train quickstart data.seq_len=1048576 parallel.block_len=16384 train.steps=3 optim.warmup_steps=0 \
train.validate_every=0 run.dir=runs/million    # streamed: a million tokens, block by block
  longreach train lm-125m --dry-run --world 64                # plan: nothing is trained
The same command again goes on from the newest checkpoint; another run.dir begins another run.
Keys: docs/config.md; RUN_DIR/config.yaml (by default runs/CONFIG/config.yaml) has those of a run.""",
    "evaluate": """
  longreach evaluate runs/quickstart
  longreach evaluate runs/quickstart --source book.txt    # a file of any length as one sequence
  longreach evaluate runs/needle data.seq_len=65536 parallel.block_len=16384    # a task's test, at another length""",
    "generate": """
  longreach generate runs/quickstart --prompt "def main(" --temperature 0.7 --top-p 0.95
  longreach generate runs/quickstart --prompt @book.txt --tokens 0 --carry-out book.carry    # read once,
  longreach generate runs/quickstart --carry-in book.carry --prompt "Then "                  # and go on from it""",
    "pack": """
  longreach pack my-texts data/packed/mine
  longreach pack shards.tar data/packed/shards --valid-fraction 0.01 --max-bad 10
Train on it: longreach train quickstart data.source=data/packed/mine""",
    "tokenizer": """
  longreach tokenizer my-texts mine.json --vocab 8192
Use it: longreach pack my-texts data/packed/tokens --tokenizer mine.json""",
    "export": """
  longreach export runs/quickstart exported
Load it: from longreach.framework.inference.export import load_exported; model = load_exported("exported")""",
    "bench": """
  longreach bench kernels --longest 65536
  longreach bench memory --memory-gib 4 --seconds 60
  longreach bench parallel""",
    "doctor": """
  longreach doctor""",
    "completion": """
  longreach completion bash > ~/.local/share/bash-completion/completions/longreach
  longreach completion zsh > ~/.zfunc/_longreach    # a directory of $fpath""",
}
