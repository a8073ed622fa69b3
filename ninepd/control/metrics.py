"""The counters as metrics, in the text format of Prometheus; docs/metrics.md has all of them."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ninepd import __version__
from ninepd.p9.messages import NUMBERS
from ninepd.stats import BOUNDS, Messages, Reader

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_OTHER: Final = "other"
_ERRORS: Final = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}  # not the other name of it
_NAMES: Final = {number: message.__name__ for message, number in NUMBERS.items()}


class Number(NamedTuple):
    """A metric with no label but the export's."""

    name: str
    field: str
    """Of ``stats.Numbers``."""
    text: str


COUNTERS: Final = (
    Number("ninepd_ring_requests", "taken", "Requests taken from the ring."),
    Number("ninepd_ring_batches", "batches", "Batches that they were taken in."),
    Number("ninepd_ring_spin_hits", "spin_hits", "Waits in which spinning found a request."),
    Number("ninepd_ring_sleeps", "sleeps", "Times that the ring's thread went to sleep."),
    Number("ninepd_ring_kicks", "kicks", "Notifications from guests."),
    Number("ninepd_ring_calls", "calls", "Notifications to guests."),
    Number("ninepd_ring_calls_saved", "calls_saved", "Batches of replies that needed none."),
    Number("ninepd_requests_dropped", "dropped", "Requests that went back without a reply."),
    Number("ninepd_stalls", "stalls", "Requests that kept the ring's thread, which lost it."),
    Number("ninepd_hand_overs", "hand_overs", "Requests given to a worker from the start."),
    Number("ninepd_reclaims", "reclaims", "Descriptors closed because they run short."),
    Number("ninepd_front_ends", "front_ends", "Front ends that have connected."),
    Number("ninepd_process_restarts", "restarts", "Processes that took the place of a dead one."),
)
GAUGES: Final = (
    Number("ninepd_requests_in_flight", "in_flight", "Requests taken and not answered."),
    Number("ninepd_fids", "fids", "Fids of the guest."),
    Number("ninepd_open_files", "files", "Files and directories that it has open."),
    Number("ninepd_descriptors", "descriptors", "Descriptors that its fids hold."),
    Number("ninepd_reclaimed", "reclaimed", "Descriptors that they would have, were there enough."),
    Number("ninepd_front_end_connected", "connected", "1 if a front end is connected."),
)
UP: Final = "ninepd_up"
DURATION: Final = "ninepd_request_duration_seconds"
ERRORS: Final = "ninepd_request_errors"
RECEIVED: Final = "ninepd_received_bytes"
SENT: Final = "ninepd_sent_bytes"
INFO: Final = "ninepd"


def message_name(number: int) -> str:
    """Of a kind of messages as they are counted."""
    return _NAMES.get(number, _OTHER)


def errors_of(message: Messages) -> dict[str, int]:
    """By the names of their numbers."""
    found: dict[str, int] = {}
    for number, count in message.errors.items():
        name = _ERRORS.get(number, _OTHER)
        found[name] = found.get(name, 0) + count
    return found


class Exports(Collector):
    """All exports, by their tags."""

    def __init__(self, exports: Mapping[str, Reader]) -> None:
        self._exports = exports

    def collect(self) -> Iterable[Metric]:
        info = InfoMetricFamily(INFO, "This program.")
        info.add_metric([], {"version": __version__})
        yield info
        up = GaugeMetricFamily(UP, "1 if the process of the export runs.", labels=["export"])
        for tag, seen in self._exports.items():
            up.add_metric([tag], bool(seen.numbers.pid))
        yield up
        for kind, numbers in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for number in numbers:
                family = kind(number.name, number.text, labels=["export"])
                for tag, seen in self._exports.items():
                    family.add_metric([tag], getattr(seen.numbers, number.field))
                yield family
        yield from self._messages()

    def _messages(self) -> Iterator[Metric]:
        labels = ["export", "message"]
        duration = HistogramMetricFamily(
            DURATION, "From when a request is taken to when its reply is there.", labels=labels
        )
        received = CounterMetricFamily(RECEIVED, "Bytes of requests.", labels=labels)
        sent = CounterMetricFamily(SENT, "Bytes of replies.", labels=labels)
        errors = CounterMetricFamily(ERRORS, "Replies that are errors.", labels=[*labels, "errno"])
        for tag, seen in self._exports.items():
            for message in seen.messages():
                name = message_name(message.type)
                duration.add_metric([tag, name], _buckets(message), message.seconds)
                received.add_metric([tag, name], message.bytes_in)
                sent.add_metric([tag, name], message.bytes_out)
                for error, count in errors_of(message).items():
                    errors.add_metric([tag, name, error], count)
        yield from (duration, received, sent, errors)


def _buckets(message: Messages) -> list[tuple[str, float]]:
    """Each with all that are before it, as Prometheus has them."""
    total = 0
    found = []
    for bound, count in zip((*map(repr, BOUNDS), "+Inf"), message.buckets, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def registry(exports: Mapping[str, Reader]) -> CollectorRegistry:
    found = CollectorRegistry(auto_describe=False)
    found.register(Exports(exports))
    return found


def text(found: CollectorRegistry) -> bytes:
    return generate_latest(found)
