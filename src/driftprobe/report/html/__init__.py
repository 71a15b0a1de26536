"""report.html: what people look at. The verdict in words, then why, then every number as a picture, in one file.

Pure like every report: the same judgement, traces and payloads give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from driftprobe.compare import PayloadSource
from driftprobe.floor import LIMIT
from driftprobe.judgement import Judgement
from driftprobe.report.facts import all_prompts, sides
from driftprobe.report.html.close import attention_rows, top_tokens
from driftprobe.report.html.page import fill
from driftprobe.report.html.pool import Pool, Words, encode, name, short
from driftprobe.report.html.prints import Prints
from driftprobe.report.html.rows import encode_rows
from driftprobe.report.html.story import tell
from driftprobe.report.html.views import (
    NUMBERS,
    Bands,
    View,
    about_taps,
    all_views,
    chosen,
    control_bands,
    encode_view,
    first_look,
    guilty_arms,
    size_of,
)
from driftprobe.trace import Trace

DATA_BYTES = 2_000_000
"""What maps and fingerprints of a page may take together."""
CLOSE_BYTES = 250_000
"""What the attention rows and logits of all views may take."""


def render(judgement: Judgement, traces: Sequence[Trace], payloads: PayloadSource) -> str:
    """Return the page. `traces` are all that were judged, those of the ladder too."""
    return fill(tell(judgement, traces), page_data(judgement, traces, payloads))


def page_data(judgement: Judgement, traces: Sequence[Trace], payloads: PayloadSource) -> str:
    """Return what the page's scripts draw, as JSON."""
    everything = all_views(judgement)
    start, cell = first_look(everything, judgement)
    views = chosen(everything, start)
    words, taps, pool, row_pool = Words(), Words(), Pool(), Pool()
    bands = _bands(views, traces)
    encoded = [encode_view(view, bands[_key(view)], pool, words, taps) for view in views]
    prints = Prints(words, DATA_BYTES - pool.size - NUMBERS * sum(len(view.cells) for view in views))
    prints.take(views)
    room = CLOSE_BYTES
    for view, body in zip(views, encoded, strict=True):
        body["p"] = pool.add([prints.number(c.reference) for c in view.cells])
        body["d"] = pool.add([prints.number(c.candidate) for c in view.cells])
        body["rows"] = encode_rows(view, row_pool)
        room -= _add_close(body, view, payloads, room)
    head: dict[str, Any] = {
        "limit": LIMIT, "sides": sides(judgement), "start": [_index(everything, views, start), cell],
        "leftOut": [len(everything) - len(views), prints.left_out], "ladders": _ladders(judgement), "views": encoded,
        "taps": about_taps(taps.listed()), "words": words.listed(),
    }  # fmt: skip
    return f'{encode(head)[:-1]},"columns":{pool.json()},"rows":{row_pool.json()},"prints":{prints.json()}}}'


_Key = tuple[str, str, str]
"""Mode, prompt and rung: a folder has one trace for each."""


def _key(view: View) -> _Key:
    return (view.judged.mode, view.judged.prompt, view.rung)


def _bands(views: Sequence[View], traces: Sequence[Trace]) -> dict[_Key, Bands]:
    """Return the bands of each trace that is shown; a rung whose run is missing stands for itself."""
    known = {(trace.header.mode, trace.header.prompt, trace.header.rung): trace for trace in traces}
    alone = {key[:2]: trace for key, trace in reversed(known.items())}
    shown = {_key(view): view.judged for view in views}
    return {key: control_bands(known.get(key) or alone[key[:2]], guilty_arms(judged)) for key, judged in shown.items()}


def _index(everything: Sequence[View], views: Sequence[View], start: int) -> int:
    return next((i for i, view in enumerate(views) if view is everything[start]), 0)


def _add_close(body: dict[str, Any], view: View, payloads: PayloadSource, room: int) -> int:
    """Add a view's attention rows and logits where they fit; return what they take."""
    taken = 0
    for key, found in (("logits", top_tokens(view, payloads)), ("attention", attention_rows(view, payloads))):
        size = 0 if found is None else size_of(found)
        if found is not None and taken + size <= room:
            body[key] = found
            taken += size
    return taken


def _ladders(judgement: Judgement) -> list[dict[str, Any]]:
    """Return the two roundoffs of each rung that was climbed."""
    return [
        {"mode": name(item.mode), "prompt": name(item.prompt), "rung": name(item.ladder.rung),
         "dtype": name(item.engine.dtype), "units": [short(item.ladder.base_unit), short(item.ladder.unit)],
         "words": item.ladder.outcome.words}
        for item in all_prompts(judgement) if item.ladder is not None
    ]  # fmt: skip
