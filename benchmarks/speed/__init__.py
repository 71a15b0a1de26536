"""How fast driftprobe is, beside its peers: `python -m benchmarks.speed`."""
