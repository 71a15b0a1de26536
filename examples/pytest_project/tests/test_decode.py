"""Does the model decode what it would have prefilled? Three ways to ask, and a bug that this project knows."""

import pytest

import driftprobe

PROMPTS = {"greeting": "Hello"}


@pytest.mark.driftprobe(model="builtin:tiny", prompts={"ids": [72, 105, 33]}, modes="kv_aligned", ladder="off")
def test_with_a_mark():
    """The check is made before the body runs."""


def test_with_the_function():
    result = driftprobe.assert_equivalent("builtin:tiny", PROMPTS, modes="as_designed", ladder="off")
    assert result.detection_limit.smallest < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_fixture(driftprobe, dtype):
    driftprobe.assert_equivalent("builtin:tiny", PROMPTS, dtype=dtype, modes=["kv_aligned"], ladder="off")


def test_a_known_bug():
    """Accepted in driftprobe-accepted.toml; another bug in its place would fail."""
    driftprobe.assert_equivalent("builtin:tiny", PROMPTS, modes="kv_aligned", ladder="off", fault="rope_plus_one")
