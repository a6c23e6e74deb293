"""Tests of the images that a served model accepts: encoded files, arrays, and URLs of allowed public hosts."""

from __future__ import annotations

import base64
import http.server
import socket
import threading

import numpy as np
import pytest

from m2f.cluster.registry import fetch
from m2f.cluster.registry.fetch import FetchError, fetch_image, is_public
from m2f.cluster.registry.images import ImageError, flatten_images, read_pixels
from m2f.data_pipeline.image_file import encode_png
from tests.waiting import PATIENCE_S

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
PNG = encode_png(PIXELS)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        body = PNG if self.path.startswith("/image") else b"x" * 3000
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.requests.append((self.path, self.headers["Host"]))
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """Start a server at the host name `pictures.example`, whose address counts as public."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = socket.getaddrinfo

    def resolve(host, port, *rest, **options):
        return real("127.0.0.1" if host == "pictures.example" else host, port, *rest, **options)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_image_from_an_allowed_host_is_fetched(server):
    host = f"pictures.example:{server.server_port}"
    assert fetch_image(f"http://{host}/image?key=1#part", [host]) == PNG
    assert server.requests == [("/image?key=1", host)]
    assert np.array_equal(read_pixels(f"HTTP://{host.upper()}/image", [host]), PIXELS)


def test_large_bodies_redirects_and_unlisted_hosts_are_rejected(server):
    host = f"pictures.example:{server.server_port}"
    for path in ("large", "endless"):
        with pytest.raises(FetchError, match="larger than"):
            fetch_image(f"http://{host}/{path}", [host], max_bytes=2000)
    with pytest.raises(FetchError, match="returned HTTP 302"):
        fetch_image(f"http://{host}/redirect", [host])
    with pytest.raises(FetchError, match=r"not allowed \(allowed hosts: other\.example\)"):
        fetch_image(f"http://{host}/image", ["other.example"])
    with pytest.raises(FetchError, match="allowed hosts: none"):
        fetch_image("https://pictures.example/image", [])


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://[2606:4700::1111]/x", "[2606:4700::1111]"),
        ("http://[2606:4700::1111]/x", "2606:4700::1111"),
        ("http://[2606:4700::1111]:8080/x", "[2606:4700::1111]:8080"),
        ("http://pictures.example/x", "pictures.example:80"),
        ("https://pictures.example/x", "pictures.example:443"),
        ("https://pictures.example:443/x", "pictures.example"),
    ],
)
def test_allowed_hosts_may_be_ipv6_addresses_and_name_the_default_port(monkeypatch, url, host):
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *words, **options: [(10, 1, 6, "", ("::1", 80))])
    with pytest.raises(FetchError, match="not public"):  # so the host is allowed
        fetch_image(url, [host])


@pytest.mark.parametrize(
    ("url", "host", "advice"),
    [
        ("http://[2606:4700::1111]:8080/x", "[2606:4700::1111]", r"--allow-url \[2606:4700::1111\]:8080"),
        ("http://[2606:4700::1111]/x", "[2606:4700::1111]:443", r"--allow-url \[2606:4700::1111\]"),
        ("http://pictures.example:443/x", "pictures.example", "--allow-url pictures.example:443"),
        ("https://pictures.example/x", "pictures.example:80", "--allow-url pictures.example"),
    ],
)
def test_a_host_is_not_allowed_with_another_port(url, host, advice):
    with pytest.raises(FetchError, match=rf"are not allowed .*{advice}$"):
        fetch_image(url, [host])


SLOW = {
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-Part: 1\r\n"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a chunk's length": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "a body without length": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "TLS": (b"\x16\x03\x03\x40\x00", b"\x02"),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("slow", SLOW)
def test_slow_responses_end_at_the_timeout(server, monkeypatch, slow):
    """The response sends bytes continually and never ends."""
    first, repeated = SLOW[slow]
    listener = socket.create_server(("127.0.0.1", 0))
    port, stopped = listener.getsockname()[1], threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(first)
                while not stopped.wait(0.02):
                    connection.sendall(repeated)
            except OSError:
                pass

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    host = f"pictures.example:{port}"
    scheme = "https" if slow == "TLS" else "http"
    outcome = []

    def attempt():
        try:
            outcome.append(fetch_image(f"{scheme}://{host}/image", [host]))
        except FetchError as error:
            outcome.append(str(error))

    fetching = threading.Thread(target=attempt, daemon=True)
    fetching.start()
    fetching.join(PATIENCE_S / 4)  # without the timeout, it would never end
    stopped.set()
    thread.join(PATIENCE_S)
    listener.close()
    assert outcome == ["pictures.example: the image did not arrive within 0.5 s"]


def test_host_that_resolves_to_a_private_address_is_rejected(monkeypatch):
    def resolve(*words, **options):
        return [(2, 1, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    with pytest.raises(FetchError, match="address that is not public"):
        fetch_image("http://pictures.example/image", ["pictures.example"])


@pytest.mark.parametrize(
    "url",
    [
        "http://user:key@host/x",
        "http:///x",
        "https://host/a b",
        "http://host\r\nHost: other/x",
        "http://host:99999/x",
        "http://[::1/x",
        "http://host:key/x",
        "http://user:key@[x]/x",
    ],
)
def test_malformed_urls_are_rejected_without_being_quoted(url):
    with pytest.raises(FetchError) as caught:
        fetch_image(url, ["host"])
    assert "key" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("name", False),
    ],
)
def test_is_public_distinguishes_public_and_private_addresses(address, public):
    assert is_public(address) is public


def test_an_image_may_be_bytes_text_or_an_array():
    text = base64.b64encode(PNG).decode()
    for value in (
        PNG,
        bytearray(PNG),
        text,
        f"data:image/png;base64,{text}",
        PIXELS,
        PIXELS.tolist(),
        PIXELS.astype(int),
    ):
        assert np.array_equal(read_pixels(value), PIXELS)
    by_row = np.empty(4, dtype=object)
    by_row[:] = PIXELS.tolist()
    assert np.array_equal(read_pixels(by_row), PIXELS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/etc/passwd", "file paths are not accepted"),
        (b"", "not a readable image"),
        (PNG[:40], "not a readable image"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.full((4, 4, 3), 256), "values from 256 to 256; pixels must be integers from 0 to 255"),
        ([[[300, -1, 0]]], "values from -1 to 300"),
        ([[1, 2], [3]], "lists"),
        (None, "shape"),
    ],
)
def test_invalid_images_are_rejected(value, message):
    with pytest.raises(ImageError, match=message):
        read_pixels(value)


def test_row_with_a_list_of_strings_is_several_images():
    text, array = base64.b64encode(PNG).decode(), PIXELS.tolist()
    assert flatten_images([[text, text], PNG, array, np.stack([PIXELS, PIXELS])])[:4] == [text, text, PNG, array]
    assert len(flatten_images([np.stack([PIXELS, PIXELS])])) == 2
    assert flatten_images([np.array([text, text])]) == [text, text]
