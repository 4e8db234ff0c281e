"""longreach: training on very long sequences, one sequence split over many ranks.

The names below are the public interface; the modules that they come from have more. They are imported when they are
first used: ``import longreach`` imports neither torch's compiler nor DeepSpeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .framework.config import load as load_config
    from .framework.inference.export import load_exported
    from .framework.mixers import register
    from .framework.model import build_model
    from .framework.trainer import train
    from .kernels.elementwise import elementwise_attention
    from .kernels.linear_attention import linear_attention
    from .kernels.long_conv import long_conv
    from .kernels.short_conv import short_conv
    from .parallel.mesh import init_mesh
    from .parallel.span import Span

__version__ = "0.2.0"

__all__ = [
    "InputError",
    "Span",
    "build_model",
    "elementwise_attention",
    "init_mesh",
    "linear_attention",
    "load_config",
    "load_exported",
    "long_conv",
    "register",
    "short_conv",
    "train",
]

_HOMES = {
    "InputError": ("errors", "InputError"),
    "Span": ("parallel.span", "Span"),
    "build_model": ("framework.model", "build_model"),
    "elementwise_attention": ("kernels.elementwise", "elementwise_attention"),
    "init_mesh": ("parallel.mesh", "init_mesh"),
    "linear_attention": ("kernels.linear_attention", "linear_attention"),
    "load_config": ("framework.config", "load"),
    "load_exported": ("framework.inference.export", "load_exported"),
    "long_conv": ("kernels.long_conv", "long_conv"),
    "register": ("framework.mixers", "register"),
    "short_conv": ("kernels.short_conv", "short_conv"),
    "train": ("framework.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# Modules that moved are still found under their old names, for one release.
import_module(f"{__name__}._aliases").install()
