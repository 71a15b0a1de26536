"""Measures driftprobe's error rates: planted faults and benign variations in many models, judged by it and by others.

`python -m benchmarks.accuracy` runs what is not measured yet and writes docs/accuracy.md and docs/accuracy.json.
"""
