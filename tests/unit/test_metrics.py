"""Prometheus' view of a running machine: what is served, and to clients that mean well or not."""

import contextlib
import errno
import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from profiles import sample
from prometheus_client.parser import text_string_to_metric_families

from hypervisor.errors import ConfigError, HostError
from hypervisor.profile import metrics
from hypervisor.profile.metrics import MetricsServer, parse_place

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def asked():
    return []


@pytest.fixture
def served(asked):
    """Return a maker of servers of one sample profile, closed when the test ends."""
    servers = []

    def make(where=0):
        def profile():
            asked.append(time.monotonic())
            return sample()

        servers.append(MetricsServer(profile, where))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def get(url, **headers):
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - our own
    with DIRECT.open(request, timeout=60) as answer:
        return answer.read().decode(), answer.headers


def get_in_the_end(url):
    """Get it although the server gives a client little time, of which this thread may miss all."""
    for _ in range(20):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return get(url)
    return get(url)


def port_of(server):
    return int(server.url.rpartition(":")[2].partition("/")[0])


def exits_in(text):
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return sum(one.value for one in families["hv_exits"].samples if one.name == "hv_exits_total")


def over_unix(path, request):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(path)
        client.send(request)
        data = b""
        while chunk := client.recv(65536):
            data += chunk
    return data


def test_metrics_are_served_over_tcp_on_this_host_alone(served):
    server = served()
    assert server.url.startswith("http://127.0.0.1:")
    text, headers = get(server.url)
    assert exits_in(text) == sample().exits.count
    assert headers["Content-Type"].startswith("text/plain")


def test_the_librarys_other_format_is_served_to_who_asks(served):
    text, headers = get(served().url, Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_metrics_are_served_over_a_unix_socket_that_goes_with_the_server(served, tmp_path):
    path = str(tmp_path / "m.sock")
    server = served(f"unix={path}")
    head, _, body = over_unix(path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert exits_in(body.decode()) == sample().exits.count
    server.close()
    assert not os.path.exists(path)


def test_other_paths_are_not_found(served):
    server = served()
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server.url.removesuffix("metrics"))
    assert caught.value.code == 404
    assert b"/metrics" in caught.value.read()


def test_a_profile_serves_for_a_second(served, asked, monkeypatch):
    server = served()
    for _ in range(3):
        get(server.url)
    assert metrics.FRESH_SECONDS == 1
    began = time.monotonic()
    assert len(asked) <= 1 + (began - asked[0])  # one, unless this took longer than that
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 0)
    time.sleep(1.1)
    before = len(asked)
    get(server.url)
    get(server.url)
    assert len(asked) == before + 2


@pytest.mark.parametrize(
    "request_bytes",
    [
        *(
            b"",
            b"\r\n\r\n",
            b"\x00" * 100,
            b"GET\r\n\r\n",
            b"x" * 70_000 + b"\r\n\r\n",
            b"POST /metrics HTTP/1.1\r\n\r\n",
        ),
        *(
            b"GET /metrics HTTP/9.9\r\n\r\n",
            b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
            b"\x16\x03\x01",
        ),
    ],
)
def test_garbage_ends_nothing_and_says_nothing(served, capfd, request_bytes):
    server = served()
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=60) as client:
        client.send(request_bytes)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError:
            pass
    assert exits_in(get(server.url)[0]) == sample().exits.count
    assert capfd.readouterr() == ("", "")


def test_a_client_that_says_nothing_is_dropped_and_the_next_is_served(served, monkeypatch):
    monkeypatch.setattr(metrics, "CLIENT_SECONDS", 1.0)
    server = served()
    with socket.create_connection(("127.0.0.1", port_of(server))) as silent:
        silent.settimeout(60)
        assert exits_in(get_in_the_end(server.url)[0]) == sample().exits.count
        assert silent.recv(100) == b""


def test_a_client_that_says_little_at_a_time_is_dropped(served, monkeypatch):
    monkeypatch.setattr(metrics, "CLIENT_SECONDS", 1.0)
    server = served()
    with socket.create_connection(("127.0.0.1", port_of(server))) as slow:
        began = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT011, PT012 - EPIPE or ECONNRESET, after a while
            while time.monotonic() < began + 60:
                slow.send(b"x")
                time.sleep(0.02)
    assert exits_in(get_in_the_end(server.url)[0]) == sample().exits.count


def test_a_client_that_does_not_read_its_answer_is_dropped(served, monkeypatch):
    monkeypatch.setattr(metrics, "CLIENT_SECONDS", 1.0)

    def app(self, environ, start_response):
        start_response("200 OK", [])
        return [b"x" * (64 << 20 if environ["QUERY_STRING"] == "much" else 5)]

    monkeypatch.setattr(metrics.MetricsServer, "_app", app)
    server = served()
    with socket.create_connection(("127.0.0.1", port_of(server))) as deaf:
        deaf.send(b"GET /metrics?much HTTP/1.0\r\n\r\n")
        assert get_in_the_end(server.url)[0] == "xxxxx"


def test_many_clients_at_once_are_served_by_one_thread(served):
    server = served()
    before = threading.active_count()
    results = []
    threads = [threading.Thread(target=lambda: results.append(exits_in(get(server.url)[0]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + len(threads)
    for thread in threads:
        thread.join()
    assert results == [sample().exits.count] * 6


def test_after_a_client_the_thread_rests(served, monkeypatch):
    monkeypatch.setattr(metrics, "LEAST_REST", 0.5)
    server = served()
    began = time.monotonic()  # before the rest begins
    get(server.url)
    get(server.url)
    assert time.monotonic() - began >= 0.5


def test_closing_waits_for_no_rest(served, monkeypatch):
    monkeypatch.setattr(metrics, "LEAST_REST", 50)
    server = served()
    get(server.url)
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 30


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (9100, ("127.0.0.1", 9100)),
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),  # noqa: S104 - whoever asks for it
        ("[::1]:9100", ("::1", 9100)),
        ("localhost:0", ("localhost", 0)),
        ("unix=/tmp/x y", ("/tmp/x y", -1)),  # noqa: S108 - a name
    ],
)
def test_places(text, place):
    assert parse_place(text) == place


@pytest.mark.parametrize(
    "text",
    ["", ":", ":9100", "x", "1e3", "-1", "65536", "99999999999", "unix=", "unix", "h:x", "٣", "9100 ", "unix=\0", True],
)
def test_places_that_are_none(text):
    with pytest.raises(ConfigError):
        parse_place(text)


def test_a_port_in_use_is_said_so_with_what_to_do(served):
    server = served()
    with pytest.raises(HostError, match="already in use") as caught:
        served(port_of(server))
    assert "ss -ltnp" in caught.value.hint


def test_a_privileged_port_is_said_so(served, monkeypatch):
    def refuse(family, address):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(metrics, "_Server", refuse)
    with pytest.raises(HostError, match=r"port 80 .*Permission denied") as caught:
        served(80)
    assert "1024" in caught.value.hint


def test_an_unknown_host_is_said_so(served):
    with pytest.raises(ConfigError, match="no address is known"):
        served("host.invalid:9100")


def test_a_unix_path_that_is_too_long_is_said_so(served, tmp_path):
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        served(f"unix={tmp_path}/{'x' * 100}")


def test_a_unix_path_in_use_is_refused_a_dead_one_is_taken(served, tmp_path):
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    served(f"unix={path}")
    with pytest.raises(HostError, match="already in use"):
        served(f"unix={path}")
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(HostError, match="already in use"):
        served(f"unix={tmp_path}/file")
    assert (tmp_path / "file").read_text() == "somebody's"
