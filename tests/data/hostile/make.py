"""Makes the hostile files beside it, byte for byte: ``python tests/data/hostile/make.py``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

END = bytes(1024)
EXECUTES = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle
OBJECTS = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
NPY = b"\x93NUMPY\x01\x00" + len(OBJECTS).to_bytes(2, "little") + OBJECTS + EXECUTES


def header(name: bytes, size: bytes, kind: bytes = b"0", target: bytes = b"") -> bytes:
    """A ustar header of one block."""
    front = name.ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + size.rjust(11, b"0")[:11].ljust(12, b"\0")
    rest = kind + target.ljust(100, b"\0") + b"ustar\x0000" + bytes(247)
    front += b"00000000000\0"
    return front + b"%06o\0 " % (sum(front) + sum(rest) + 8 * 32) + rest


def member(name: str, content: bytes = b"", kind: bytes = b"0", target: bytes = b"") -> bytes:
    """A header and its content."""
    return header(name.encode(), b"%o" % len(content), kind, target) + content + bytes(-len(content) % 512)


def pax(key: str, value: str, kind: bytes = b"x") -> bytes:
    """Pax records of one line, for the next member or for all."""
    line, length = f" {key}={value}\n".encode(), 0
    while length != len(b"%d" % length + line):
        length = len(b"%d" % length + line)
    return member("pax", b"%d" % length + line, kind)


def sized(name: str, size: bytes) -> bytes:
    """A header whose size takes all twelve bytes."""
    block = bytearray(header(name.encode(), b"0"))
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = member("a.txt", b"a text of someone else")

TARS = {
    "absolute": member("/tmp/longreach-evil.txt", b"evil"),
    "backslash": member("..\\evil.txt", b"evil"),
    "bad-gzip": GOOD + member("b.txt.gz", b"\x1f\x8b\x08\x00 no gzip"),
    "checksum": GOOD.replace(b"0000644", b"0000645"),
    "cut-end": GOOD,
    "cut-member": member("a.txt", b"x" * 2000)[:1000],
    "device": GOOD + member("b.txt", kind=b"3"),
    "drive": member("C:evil.txt", b"evil"),
    "duplicate": GOOD + member("./a.txt", b"another"),
    "empty": b"",
    "fifo": GOOD + member("b.txt", kind=b"6"),
    "hardlink": GOOD + member("b.txt", kind=b"1", target=b"a.txt"),
    "long-name": member("L", b"n" * 5000, b"L") + GOOD,
    "many-digits": sized("a.txt", b"\x80" + 11 * b"\xff"),
    "names-for-all": pax("path", "../../evil.txt", b"g") + GOOD,
    "negative-size": sized("a.txt", b"\xff" * 12),
    "newline": pax("path", "a\nlongreach: all is well.txt") + GOOD,
    "no-content": member("a.txt"),
    "no-member": b"",
    "nul": pax("path", "a.txt\0../../evil.txt") + GOOD,
    "object-array": GOOD + member("b.npy", NPY),
    "pax-length": member("pax", b"99999999 path=b.txt\n", b"x") + GOOD,
    "pax-size": pax("size", "9" * 19) + GOOD,
    "pickle": GOOD + member("b.pkl", EXECUTES),
    "pyd": GOOD + member("b.pyd", EXECUTES),
    "sparse": GOOD + member("b.txt", kind=b"S"),
    "symlink": member("a", kind=b"2", target=b"../..") + member("a/evil.txt", b"evil"),
    "traversal": GOOD + member("b/../../../evil.txt", b"evil"),
    "two-in-one": GOOD + END + GOOD,
    "unknown": GOOD + member("b.so", b"\x7fELF"),
}
UNENDED = ("cut-end", "cut-member", "empty", "long-name")


def packed(shard: bytes) -> dict[str, Any]:
    """The fields of an index of one shard that holds two documents of 256 bytes."""
    row = {"name": "train-00000.tar", "bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}
    columns = {"key": ["a", "b"], "shard": [0, 0], "offset": [512, 1536], "length": [256, 256]}
    nothing: dict[str, Any] = {"key": [], "shard": [], "offset": [], "length": []}
    splits = {
        "train": {"num_tokens": 512, "shards": [{**row, "num_samples": 2}], "documents": columns},
        "valid": {"num_tokens": 0, "shards": [], "documents": nothing},
    }
    fields = {"format": "longreach-pack", "name": "hostile", "baselines": {}, "source": {}, "version": 1}
    return {**fields, "vocabulary": {"kind": "bytes", "size": 256}, "dtype": "uint8", "splits": splits}


def sign(fields: dict[str, Any]) -> str:
    """The JSON, with the fingerprint that it should have: who writes an index can write that too."""
    content = {key: fields[key] for key in ("version", "vocabulary", "dtype", "splits")}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**fields, "fingerprint": digest})


def put(*place: str | int) -> Callable[[Any, dict[str, Any]], None]:
    """What writes a value into the fields, at a place below the train split or, after a dot, below the root."""

    def change(value: Any, fields: dict[str, Any]) -> None:
        tree: Any = fields if place[0] == "." else fields["splits"]["train"]
        *way, last = place[1:] if place[0] == "." else place
        for name in way:
            tree = tree[name]
        tree[last] = value

    return change


TWO = member("00000000.bin", bytes(range(256))) + member("00000001.bin", bytes(range(256))) + END
LINKED = member("00000000.bin", bytes(range(256))) + member("00000001.bin", bytes(256), b"2", b"/etc/passwd") + END
INDICES: dict[str, tuple[bytes, Callable[[Any, dict[str, Any]], None], Any]] = {
    "command": (TWO, put("shards", 0, "name"), "pipe:touch executed.tar"),
    "digits": (TWO, put("documents", "length", 0), int("9" * 4000)),
    "dtype": (TWO, put(".", "dtype"), "object"),
    "infinite": (TWO, put("documents", "offset", 0), float("inf")),
    "inside": (TWO, put("documents", "offset", 0), 256),
    "large-vocabulary": (TWO, put(".", "vocabulary", "size"), 10**18),
    "linked": (LINKED, put(".", "name"), "linked"),
    "many-samples": (TWO, put("shards", 0, "num_samples"), 1 << 40),
    "measured": (TWO, put(".", "baselines"), {"gzip": "a lot"}),
    "outside": (TWO, put("documents", "length", 1), 4096),
    "screen": (TWO, put(".", "name"), "\x1b[2J"),
    "small-vocabulary": (TWO, put(".", "vocabulary", "size"), 200),
    "traversal": (TWO, put("shards", 0, "name"), "../../secret.tar"),
}


def tensors(header: Any, content: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file with this header, of the length that is said."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def described(**changes: Any) -> dict[str, Any]:
    """The header of a file that holds four values of a tensor ``w``."""
    metadata = {"starts": '{"w": 0}', "random": "{}", **changes.pop("metadata", {})}
    return {"__metadata__": metadata, "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


STATE: dict[str, Any] = {
    "format": 2,
    "state": {"step": 1, "consumed": 2, "seed": 0, "batch_size": 2},
    "optimizer_step": 1,
    "loss_scaler": {},
    "shapes": {"model": {"w": [4]}, "optimizer": {}},
}
GOOD_TENSORS = tensors(described())
MODELS = {  # of which a checkpoint is right otherwise
    "another-model": GOOD_TENSORS,
    "beyond-the-file": tensors(described(data_offsets=[0, 1 << 40])),
    "header-cut": tensors(described())[:20],
    "header-huge": tensors(b"{}", length=1 << 62),
    "header-no-json": tensors(b"{" * 64),
    "header-of-nothing": b"",
    "negative-shape": tensors(described(shape=[-4])),
    "no-metadata": tensors({"w": described()["w"]}),
    "overlapping": tensors({**described(), "v": described()["w"]}),
    "pickle": EXECUTES,
    "random-no-json": tensors(described(metadata={"random": "["})),
    "shape-huge": tensors(described(shape=[1 << 62])),
    "starts-deep": tensors(described(metadata={"starts": "[" * 20_000})),
    "starts-elsewhere": tensors(described(metadata={"starts": '{"w": 2}'})),
    "starts-negative": tensors(described(metadata={"starts": '{"w": -4}'})),
    "starts-no-number": tensors(described(metadata={"starts": '{"w": "../../evil"}'})),
    "two-dimensions": tensors(described(shape=[2, 2])),
    "unknown-type": tensors(described(dtype="PICKLE")),
}
STATES: dict[str, Callable[[dict[str, Any]], object]] = {  # what is changed in one that is right otherwise
    "absolute-name": lambda d: d["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}),
    "command": lambda d: d["files"].update({"model-$(touch executed).safetensors": {"bytes": 0, "sha256": ""}}),
    "files-no-list": lambda d: d.update(files=["state.json"]),
    "negative-step": lambda d: d["state"].update(step=-1),
    "newer": lambda d: d.update(format=3),
    "no-shapes": lambda d: d.pop("shapes"),
    "shape-of-text": lambda d: d["shapes"]["model"].update(w=["4"]),
    "step-of-text": lambda d: d["state"].update(step="1; touch executed"),
    "step-too-large": lambda d: d["state"].update(step=10**30),
    "traversal-name": lambda d: d["files"].update({"../../secret": {"bytes": 0, "sha256": ""}}),
}


def write_checkpoint(directory: Path, model: bytes, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a checkpoint of which every digest is right."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"model-00000-of-00001.safetensors": model, "optimizer-00000-of-00001.safetensors": tensors({})}
    document = json.loads(json.dumps(STATE))
    document["files"] = {}
    for name, content in files.items():
        (directory / name).write_bytes(content)
        document["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(document)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (directory / "state.json").write_text(json.dumps({**document, "sha256": digest}))


def make(folder: Path) -> None:
    """Write all of them into a folder."""
    (folder / "tars").mkdir(exist_ok=True)
    for name, content in TARS.items():
        (folder / "tars" / f"{name}.tar").write_bytes(content if name in UNENDED else content + END)
    for name, (shard, change, value) in INDICES.items():
        fields = packed(shard)
        change(value, fields)
        directory = folder / "indices" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "index.json").write_text(sign(fields))
        (directory / "train-00000.tar").write_bytes(shard)
    for name, model in MODELS.items():
        write_checkpoint(folder / "checkpoints" / name, model, lambda document: None)
    for name, change_state in STATES.items():
        write_checkpoint(folder / "checkpoints" / name, GOOD_TENSORS, change_state)
    deep = folder / "indices" / "deep"
    deep.mkdir(exist_ok=True)
    (deep / "index.json").write_text(100_000 * "[")


if __name__ == "__main__":
    make(Path(__file__).parent)
