"""Where a row's weight begins and ends, found on the host and on a device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from driftprobe.engines.hf.cutting import ends_on_device, ends_on_host  # noqa: E402


@pytest.mark.parametrize("heads", [1, 3])
def test_both_ways_find_the_same_ends(heads: int) -> None:
    """On an accelerator it is the second that runs; its ops are those of a CPU."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.rand(heads, columns, generator=draw) < share for columns in (1, 2, 7) for share in (0.0, 0.2, 1.0)]
    host = list(ends_on_host(given))
    assert host == list(ends_on_device(given))
    assert (7, 0) in host and (0, 7) in host  # no weight at all, and weight everywhere
    assert list(ends_on_host([])) == list(ends_on_device([])) == []
