"""Our package `kernels` has the import name of Hugging Face's."""

from __future__ import annotations

from transformers.utils import is_kernels_available

import kernels


def test_transformers_does_not_take_ours_for_theirs() -> None:
    """The library sees that the package it knows by this name is not installed."""
    assert kernels.__file__
    assert not is_kernels_available()
