"""A TPU VM's metadata server announces that the VM goes; the run stops as by SIGTERM. Nowhere else does anything change."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pe_rlhf_jax import hosts, main, maintenance
from pe_rlhf_jax.run import Stopped

WAIT = 30.0  # seconds after which something is taken not to come


class Server:
    """A metadata server, whose fields a test sets; it counts what it was asked."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {"maintenance-event": "NONE", "preempted": "FALSE"}
        self.asked = 0
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/computeMetadata/v1/instance/")
                known = self.headers["Metadata-Flavor"] == "Google" and name in metadata.fields
                self.send_response(200 if known else 403)
                self.end_headers()
                self.wfile.write(metadata.fields[name].encode() if known else b"TRUE")
                metadata.asked += 1

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_port}"

    def wait_until_asked(self, more: int) -> None:
        until, limit = self.asked + more, time.monotonic() + WAIT
        while self.asked < until:
            assert time.monotonic() < limit, "nobody asked"
            time.sleep(0.01)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """The metadata server of the TPU VM that this machine then is, behind a proxy that knows nothing of it."""
    metadata = Server()
    threading.Thread(target=metadata.http.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", metadata.address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(hosts, "on_tpu", lambda: True)
    yield metadata
    metadata.http.shutdown()
    metadata.http.server_close()


def asked(stop: main.StopSignal) -> str | None:
    """What the run is told once it is told something."""
    limit = time.monotonic() + WAIT
    while (reason := stop.asked()) is None and time.monotonic() < limit:
        time.sleep(0.01)
    return reason


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "notice of maintenance"), ("preempted", "TRUE", "a spot TPU VM is taken away")],
)
def test_a_notice_asks_the_run_to_stop(server, field, value, said):
    """Also when the server was out of order before, and other values mean nothing."""
    stop = main.StopSignal()
    usual, server.fields = server.fields, {}
    with maintenance.watched(stop.ask, every_s=0.01):
        server.wait_until_asked(4)
        for harmless in (usual, usual | {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}):
            server.fields = harmless
            server.wait_until_asked(4)
            assert stop.asked() is None
        server.fields = usual | {field: value}
        assert said in str(asked(stop))


def test_a_run_that_was_started_under_a_notice_goes_on_until_another(server):
    """Else it would stop before its first step, and whatever starts it again would do so for nothing."""
    stop = main.StopSignal()
    server.fields["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    with maintenance.watched(stop.ask, every_s=0.01):
        server.wait_until_asked(6)
        assert stop.asked() is None
        server.fields["preempted"] = "TRUE"
        assert "spot" in str(asked(stop))


def test_the_watch_ends_with_the_run(server):
    with maintenance.watched(lambda _: None, every_s=0.01):
        server.wait_until_asked(1)
        watching = [thread for thread in threading.enumerate() if thread.name == "maintenance"]
        assert len(watching) == 1 and watching[0].daemon
    watching[0].join(WAIT)
    assert not watching[0].is_alive()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no host at all", "127.0.0.1:port"])
def test_without_a_server_nothing_happens_and_nobody_waits(monkeypatch, capfd, address):
    monkeypatch.setattr(hosts, "on_tpu", lambda: True)
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    monkeypatch.setattr(maintenance, "_TIMEOUT", 0.1)
    told: list[str] = []
    began = time.perf_counter()
    with maintenance.watched(told.append, every_s=0.01):
        assert time.perf_counter() - began < 1
        (watching,) = [thread for thread in threading.enumerate() if thread.name == "maintenance"]
        time.sleep(0.3)
        assert watching.is_alive()
    watching.join(WAIT)
    assert not told and capfd.readouterr() == ("", "")


def test_a_server_that_hangs_delays_nothing(server, monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(maintenance, "_read", lambda _: answered.wait(WAIT))
    began = time.perf_counter()
    with maintenance.watched(lambda _: None):
        pass
    assert time.perf_counter() - began < 1
    answered.set()


def test_without_a_tpu_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(maintenance.threading, "Thread", lambda **_: pytest.fail("somebody would ask"))
    with maintenance.watched(lambda _: None):
        pass


def test_a_run_ends_with_75_and_says_what_was_announced(server, tmp_path, monkeypatch, capsys):
    class Run:
        """Steps that do nothing, until the run is asked to stop."""

        def __init__(self, config, folder, progress, stop, command):
            self.stop, self.context = stop, type("Context", (), {"mesh": None})

        def execute(self):
            server.wait_until_asked(2)
            server.fields["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
            raise Stopped(str(asked(self.stop)))

        def close(self):
            pass

    monkeypatch.setattr(main, "Run", Run)
    monkeypatch.setattr(maintenance, "watched", functools.partial(maintenance.watched, every_s=0.01))
    monkeypatch.setattr(main.jax, "set_mesh", lambda _: contextlib.nullcontext())
    (tmp_path / "c.yaml").write_text(f"model: {{source: x}}\nrun: {{compilation_cache: false, folder: {tmp_path / 'runs'}}}")
    monkeypatch.setattr(hosts, "start", lambda _: None)  # which would look for a slice
    assert main.cli(["--config", str(tmp_path / "c.yaml")]) == main.STOPPED
    assert "Stopped by Google's notice of maintenance of a TPU VM; everything is saved." in " ".join(capsys.readouterr().out.split())
