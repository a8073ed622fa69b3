"""A real Prometheus, Debian's, on the metrics of a live daemon; and what it makes of our rules."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ninepd.control import metrics
from ninepd.stats import reader, shared
from ninepd_guests.cache import artefact
from ninepd_guests.errors import GuestError
from ninepd_guests.packages import Archive, unpack
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client

RULES = Path(__file__).parent.parent.parent / "contrib/prometheus/ninepd.rules.yml"
LIMIT = 60.0


@pytest.fixture(scope="module")
def programs() -> str:
    """The folder of prometheus and promtool; they need nothing but a C library."""

    def make(result: str, scratch: str) -> None:
        # The older one, which runs on all Debians that ninepd does.
        debs = Archive("bookworm").download(["prometheus"], os.path.join(scratch, "debs"))
        unpack(debs, result)

    try:
        return os.path.join(artefact("prometheus", "fetching Debian's Prometheus", make), "usr/bin")
    except GuestError as error:
        pytest.skip(str(error))


def promtool(programs: str, *arguments: str, text: str = "") -> str:
    """What it says; the test fails if it finds something wrong."""
    result = subprocess.run(
        [f"{programs}/promtool", *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def prometheus(programs: str, folder: Path, target: str) -> Iterator[str]:
    """Scrapes the target every half second; where it answers."""
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 500ms}\n"
        f'rule_files: ["{RULES}"]\n'
        "scrape_configs:\n"
        f'  - {{job_name: ninepd, static_configs: [{{targets: ["{target}"]}}]}}\n'
    )
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [f"{programs}/prometheus", f"--config.file={config}", f"--web.listen-address={address}",
         f"--storage.tsdb.path={folder}/data"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def ask(url: str, path: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with closing(opener.open(f"{url}/api/v1/{path}", timeout=LIMIT)) as answer:
        return json.load(answer)["data"]


def wait_for_value(url: str, query: str) -> float:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            found = ask(url, f"query?query={quote(query)}")["result"]
        except OSError:  # it does not listen yet, or is not ready
            found = []
        if found:
            return float(found[0]["value"][1])
        time.sleep(0.1)
    raise AssertionError(f"Prometheus has no {query}")


def test_it_finds_nothing_wrong(programs: str) -> None:
    stats, fd = shared()
    message: Any = stats.address
    for kind in (12, 55):
        message.messages[kind].requests = message.messages[kind].errors[5] = 1
    with closing(reader(fd)) as seen:
        os.close(fd)
        text = metrics.text(metrics.registry({"one": seen})).decode()
    assert promtool(programs, "check", "metrics", text=text) == ""
    assert "SUCCESS" in promtool(programs, "check", "rules", str(RULES))


def test_it_scrapes_a_daemon(programs: str, start_daemon: StartDaemon, tmp_path: Path) -> None:
    target = f"127.0.0.1:{free_port()}"
    daemon = start_daemon("--metrics-listen", target)
    with Client(daemon.socket) as guest:
        guest.attach()
        for _ in range(7):
            guest.getattr(ROOT)
        with prometheus(programs, tmp_path, target) as url:
            query = 'ninepd_request_duration_seconds_count{export="test",message="Tgetattr"}'
            assert wait_for_value(url, query) == 7
            assert wait_for_value(url, 'ninepd_front_end_connected{export="test"}') == 1
            quantile = "histogram_quantile(0.99, ninepd_request_duration_seconds_bucket)"
            assert 0 < wait_for_value(url, quantile) < 10
            [group] = ask(url, "rules")["groups"]
            assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"ninepd_{name}{{{inner}}}", "values": values}


def errors(export: str, message: str, errno: str) -> dict[str, str]:
    return series("request_errors_total", "0+9x30", export=export, message=message, errno=errno)


def duration(le: str, values: str) -> dict[str, str]:
    labels = {"export": "slow", "message": "Tread", "le": le}
    return series("request_duration_seconds_bucket", values, **labels)


SERIES = [
    series("up", "0x30", export="down"),
    series("up", "1x30", export="up"),
    series("process_restarts_total", "0+1x30", export="dies"),
    series("stalls_total", "0+600x30", export="stalls"),
    series("requests_in_flight", "3x30", export="hangs"),
    series("ring_requests_total", "9x30", export="hangs"),
    series("requests_in_flight", "3x30", export="works"),
    series("ring_requests_total", "9+9x30", export="works"),
    errors("full", "Twrite", "ENOSPC"),
    errors("busy", "Twalk", "ENOENT"),
    errors("many", "Tlopen", "EMFILE"),
    duration("0.5", "0x30"),
    duration("2", "0+60x30"),
    duration("+Inf", "0+60x30"),
]
FIRING = {
    "NinepdExportDown": "down",
    "NinepdProcessDies": "dies",
    "NinepdStorageStalls": "stalls",
    "NinepdRequestsHang": "hangs",
    "NinepdInputOutputErrors": "full",
    "NinepdTooFewDescriptors": "many",
    "NinepdSlow": "slow",
}


def test_alerts_fire_when_they_should_and_no_others(programs: str, tmp_path: Path) -> None:
    fired = [
        {"labels": f'{{alertname="{name}", export="{export}"}}', "value": 1}
        for name, export in FIRING.items()
    ]
    query = 'count by (alertname, export) (ALERTS{alertstate="firing"})'
    expected = {"expr": query, "eval_time": "25m", "exp_samples": fired}
    case = {"interval": "1m", "input_series": SERIES, "promql_expr_test": [expected]}
    rules = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}
    test = tmp_path / "test.yml"
    test.write_text(json.dumps(rules))  # which is YAML as well
    assert "SUCCESS" in promtool(programs, "test", "rules", str(test))
