"""The fault proxy does what its faults say; needs no cluster."""

import http.client
import http.server
import threading
import urllib.error
import urllib.request

import pytest

from tests.cluster.fault_proxy import FaultProxy
from tests.cluster.processes import free_port

CONTENT = b"x" * 300_000


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def proxy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = FaultProxy("127.0.0.1", free_port(), "127.0.0.1", server.server_port)
    made.start()
    yield made
    made.stop()
    server.shutdown()
    server.server_close()


def ask(proxy, timeout=20):
    with urllib.request.urlopen(proxy.endpoint, timeout=timeout) as answer:
        return answer.read()


def test_without_faults_all_passes(proxy):
    assert [ask(proxy) for _ in range(5)] == [CONTENT] * 5
    assert (proxy.requests, proxy.refused, proxy.reset) == (5, 0, 0)


def test_every_third_request_is_refused(proxy):
    proxy.faults.refuse_every = 3
    codes = []
    for _ in range(6):
        try:
            codes.append(len(ask(proxy)))
        except urllib.error.HTTPError as error:
            codes.append(error.code)
            error.close()
    assert codes == [len(CONTENT), len(CONTENT), 503] * 2
    assert proxy.refused == 2


def test_every_second_connection_is_reset_in_mid_answer(proxy):
    proxy.faults.reset_every = 2
    assert ask(proxy) == CONTENT
    with pytest.raises((ConnectionError, urllib.error.URLError, http.client.IncompleteRead)):
        ask(proxy)
    assert proxy.reset == 1


def test_nothing_passes_while_stalled_and_all_of_it_later(proxy):
    proxy.faults.stalled = True
    threading.Timer(1.5, lambda: setattr(proxy.faults, "stalled", False)).start()
    with pytest.raises(TimeoutError):
        ask(proxy, timeout=0.5)
    assert ask(proxy) == CONTENT
