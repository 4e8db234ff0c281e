"""Where an adapted model's layers find the span of the call that they run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from ...parallel.span import Span


@dataclass
class View:
    """What a layer's call knows of the sequence.

    Attributes:
        span: its view of the sequence, with the layer's name in its keys.
        path: the layer's, from the model's root.
        recompute: whether layers keep only their inputs for backward, and are computed again then.
        is_local: whether the functions that mix tokens are replaced by functions of each token alone (`probe`).
    """

    span: Span
    recompute: bool = False
    is_local: bool = False
    path: str = ""
    _named: dict[str, int] = field(default_factory=dict)

    def name(self, kind: str) -> str:
        """A name for the layer's next call of this kind: each has a carry of its own."""
        number = self._named[kind] = self._named.get(kind, 0) + 1
        return kind if number == 1 else f"{kind}_{number}"

    def layer_name(self, path: str) -> str:
        """A name for the next call of the layer at ``path``: one that runs twice has two carries."""
        return self.name(path.removeprefix(f"{self.path}.") if self.path else path)

    def of_layer(self, path: str, name: str, *, cache_collectives: bool = False) -> View:
        """The view of the layer at ``path``, under the ``name`` of this call of it.

        Args:
            cache_collectives: the layer will be computed again, and its exchanges not.
        """
        fields = {"cache_collectives": True} if cache_collectives else {}
        return replace(self, span=self.span.for_layer(name, **fields), path=path, _named={})


_view: ContextVar[View | None] = ContextVar("view", default=None)


def current_view() -> View | None:
    """The view of the layer that runs, or None where the model was called without a span."""
    return _view.get()


@contextmanager
def use(view: View) -> Iterator[None]:
    """Run what is inside under ``view``."""
    token = _view.set(view)
    try:
        yield
    finally:
        _view.reset(token)
