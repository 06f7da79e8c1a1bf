"""Spans are kept while somebody records, per thread; and what a report makes of them."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks

import halovae
from halovae import comm
from halovae.base import timeline
from halovae.base.timeline import Span
from halovae.evaluation.report import lanes
from halovae.evaluation.report.lanes import INTERVALS, balance


def test_nothing_is_kept_without_a_recording() -> None:
    with timeline.recording() as found:
        pass
    timeline.note("wait", time.perf_counter())
    assert found.spans == []


def test_spans_are_relative_to_the_beginning() -> None:
    with timeline.recording() as found:
        with timeline.span("blend"):
            time.sleep(0.01)
        timeline.note("wait", found.origin + 1, found.origin + 3)
    (blend, wait) = found.spans
    assert 0 <= blend.start < blend.end < 1
    assert blend.end - blend.start >= 0.01
    assert wait == Span("wait", pytest.approx(1), pytest.approx(3))


def test_another_thread_is_not_recorded() -> None:
    with timeline.recording() as found:
        thread = threading.Thread(target=timeline.note, args=("wait", 0.0))
        thread.start()
        thread.join()
    assert found.spans == []


def test_a_span_is_kept_when_it_fails() -> None:
    with timeline.recording() as found, pytest.raises(ValueError, match="no"), timeline.span("blend"):
        raise ValueError("no")
    assert [span.name for span in found.spans] == ["blend"]


CALL = [
    Span("agree", 0, 1),
    Span("wait", 2, 3),
    Span("wait", 5, 6),
    Span("network", 1, 7),
    Span("wait", 7, 8),
    Span("gather", 7, 9),
    Span("encode", 0, 10),
]


class TestLanes:
    def test_seconds_by_kind(self) -> None:
        """A message waited for while gathering is a part of gathering."""
        seconds, (lane,) = lanes([CALL])
        assert seconds == 10
        assert lane.seconds == pytest.approx({"agree": 1, "encode": 4, "wait": 2, "gather": 2, "other": 1})
        assert lane.working == pytest.approx(4)
        assert lane.rows() == [("encode", pytest.approx(10), pytest.approx(4), lane.parts["encode"])]

    def test_each_half_has_one_time(self) -> None:
        """What only a first call does is not a part of it."""
        probed = [Span("probe", 0, 2), Span("network", 2, 5), Span("encode", 0, 5), Span("decode", 6, 9)]
        _, (lane,) = lanes([probed])
        assert [row[:2] for row in lane.rows()] == [("encode", pytest.approx(3)), ("decode", pytest.approx(3))]
        assert lane.seconds["probe"] == pytest.approx(2)

    def test_a_rank_that_runs_alone_has_no_phases(self) -> None:
        _, (lane,) = lanes([[Span("decode", 2, 5)]])
        assert lane.seconds == {"decode": 3}

    def test_a_pipeline(self) -> None:
        """What denoises and calls the VAE meanwhile is counted for the VAE."""
        _, (lane,) = lanes([[Span("text", 0, 1), Span("encode", 3, 4), Span("denoise", 2, 6), Span("decode", 6, 9)]])
        assert lane.seconds == {"text": 1, "encode": 1, "denoise": 3, "decode": 3}

    def test_shares_add_up(self) -> None:
        seconds, (lane,) = lanes([CALL])
        for kind, total in lane.seconds.items():
            assert sum(part.get(kind, 0) for part in lane.shares) * seconds / INTERVALS == pytest.approx(total)

    @given(st.lists(st.floats(0.01, 5), min_size=1, max_size=20))
    def test_every_moment_is_one_thing(self, lengths: list[float]) -> None:
        edges = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        spans = [Span(("wait", "network")[i % 2], edges[i], edges[i + 1]) for i in range(len(lengths))]
        seconds, (lane,) = lanes([[*spans, Span("decode", 0, edges[-1])]])
        assert sum(lane.seconds.values()) == pytest.approx(seconds)
        assert all(sum(part.values()) == pytest.approx(1, abs=1e-6) for part in lane.shares)

    def test_balance(self) -> None:
        _, found = lanes([[Span("encode", 0, 3)], [Span("encode", 0, 1)]])
        assert balance(found) == pytest.approx(1.5)
        assert lanes([[], []]) == (0, [])
        assert balance([]) == 1


def recorded(rank: int, mode: str) -> list[Span]:
    """A tiny encode and decode on real ranks; spans of a call are kept, and none of the warm-up before it."""
    vae = FAMILIES["kl"].build()
    if mode == "tile":
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 16, 2, 0.5
    with torch.no_grad(), halovae.parallelize(vae, mode=mode):
        comm.world().all_gather_object(None)
        image = torch.randn(1, 3, 48, 32, generator=torch.Generator().manual_seed(0))
        with timeline.recording() as found:
            vae.decode(vae.encode(image).latent_dist.mode())
    return found.spans


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_ranks_note_what_they_do(mode: str, two_ranks: Ranks) -> None:
    ranks = two_ranks.run(recorded, mode)
    seconds, found = lanes(ranks)
    for spans, lane in zip(ranks, found, strict=True):
        assert [span.name for span in spans if span.name in ("encode", "decode")] == ["encode", "decode"]
        assert {"agree", "network", "gather", "wait"} | {"probe" if mode == "exact" else "blend"} <= {
            span.name for span in spans
        }
        assert all(0 <= span.start <= span.end for span in spans)
        assert lane.working > 0
        assert lane.seconds["gather" if mode == "exact" else "blend"] > 0
        # Nothing is counted twice, and little is left out: the time between the two calls.
        assert 0.7 * seconds < sum(lane.seconds.values()) <= seconds * 1.001
