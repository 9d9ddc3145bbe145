"""`probe --weights`: which names it makes, and where it does not belong."""

from __future__ import annotations

import pytest

from stree_autotune.cli.live import _in_fp8
from stree_core.errors import ConfigError


@pytest.mark.parametrize(
    ("weights", "name"),
    [("fp8", "x-fp8-block"), ("fp8-tensor", "x-fp8-tensor"), ("fp8-channel", "x-fp8-channel")],
)
def test_a_shape_in_fp8_has_an_ending(weights: str, name: str) -> None:
    assert _in_fp8("x", weights, "x") == name


def test_weights_belong_to_shapes() -> None:
    with pytest.raises(ConfigError, match="--weights fp8 draws random weights and needs --shapes"):
        _in_fp8("folder", "fp8", "")
