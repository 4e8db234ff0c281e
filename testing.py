"""Checks for your own tests: `check_mixer` compares a mixer on several ranks, streamed and decoding with one pass."""

from __future__ import annotations

from .launch.mixer_check import check_mixer

__all__ = ["check_mixer"]
