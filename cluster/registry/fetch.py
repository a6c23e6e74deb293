"""Download images by URL for a served model, with protection against server-side request forgery.

Only allowed hosts with public addresses are contacted, and the size is limited. The connection uses the address that
was checked, so that a changed DNS answer (DNS rebinding) has no effect. Redirects are not followed.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection
from http import HTTPStatus
from urllib.parse import SplitResult, urlsplit

from m2f.model.errors import UserError

MAX_BYTES = 32 * 2**20
"""Maximum size of an encoded image, in bytes."""
TIMEOUT_S = 10.0
"""Seconds for the whole download: connection, response and body."""
_CHUNK_BYTES = 2**16
"""Largest number of bytes per read. The size limit is checked after each, so it is exceeded by less than this."""
_PORTS = {"http": 80, "https": 443}
_IPV4_IN_IPV6_NETWORKS = tuple(
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
"""IPv6 networks whose addresses contain an IPv4 address, which may be private."""


class FetchError(UserError):
    """Downloading an image is not allowed, or failed.

    The message names the host but never the rest of the URL, which may contain a key.
    """


def is_url(text: str) -> bool:
    """Return whether a text is an http(s) URL, not an encoded image."""
    return text[:8].lower().startswith(("http://", "https://"))


def fetch_image(url: str, allowed: Collection[str], max_bytes: int = MAX_BYTES) -> bytes:
    """Download a URL and return the body.

    Args:
        url: http or https URL.
        allowed: allowed hosts as in URLs, with `:PORT` if it is not the default port of the scheme. IPv6 addresses are
            in brackets; without a port, the brackets may be left out.
        max_bytes: maximum size of the body. If the response states a larger size, the body is not read.

    Raises:
        FetchError: the host is not allowed or not public, or the download failed, is too large or took too long.
    """
    parts, host, port = _parse_allowed_url(url, allowed)
    deadline = time.monotonic() + TIMEOUT_S
    address = _public_address(host, port)
    path = parts.path or "/"
    target = f"{path}?{parts.query}" if parts.query else path
    connection = _Connection(host, port, address, secure=parts.scheme.lower() == "https")
    timer = threading.Timer(deadline - time.monotonic(), connection.abort)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "m2f"})
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise FetchError(f"{host} returned HTTP {response.status} {response.reason} instead of an image")
        if response.length is not None and response.length > max_bytes:
            raise FetchError(_size_message(host, max_bytes))
        body = _read_body(response, host, max_bytes)
        if connection.timed_out:  # without a length, a body seems complete when the timer shuts the socket down
            raise FetchError(_timeout_message(host))
        return body
    except (OSError, http.client.HTTPException) as error:
        if connection.timed_out or isinstance(error, TimeoutError):
            raise FetchError(_timeout_message(host)) from error
        raise FetchError(f"{host}: the image cannot be fetched ({type(error).__name__}: {error})") from error
    finally:
        timer.cancel()
        connection.close()


def _parse_allowed_url(url: str, allowed: Collection[str]) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host, scheme = (parts.hostname or "").lower(), parts.scheme.lower()
        port = parts.port or _PORTS.get(scheme, 0)
    except ValueError:  # the error message quotes parts of the URL and is therefore not shown
        raise FetchError("the host or port in the URL of the image is malformed") from None
    url_host = f"[{host}]" if ":" in host else host  # an IPv6 address
    has_default_port = port == _PORTS.get(scheme)
    names = {f"{url_host}:{port}", *((url_host, host) if has_default_port else ())}
    if not host or scheme not in _PORTS or "@" in parts.netloc or any(ord(c) <= 32 or ord(c) > 126 for c in url):
        raise FetchError(
            "the URL of the image must be http://HOST/... or https://HOST/..., in ASCII, without a user name"
        )
    if names.isdisjoint(one.lower() for one in allowed):
        host_and_port = url_host if has_default_port else f"{url_host}:{port}"
        known = ", ".join(sorted(allowed)) or "none"
        raise FetchError(
            f"images from {host_and_port} are not allowed (allowed hosts: {known}). Send the bytes of the image, or "
            f"register the model with --allow-url {host_and_port}"
        )
    return parts, host, port


def _public_address(host: str, port: int) -> str:
    """Resolve a host and return one of its addresses. Raises FetchError unless all of its addresses are public."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FetchError(f"{host}: the host name cannot be resolved ({error})") from error
    if not found or not all(is_public(str(address)) for address in found):
        raise FetchError(f"{host} has an address that is not public; images are only fetched from public addresses")
    return str(min(found, key=lambda address: (":" in str(address), str(address))))


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.is_site_local or any(ip in net for net in _IPV4_IN_IPV6_NETWORKS):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Connection(http.client.HTTPConnection):
    """HTTP(S) connection to a given IP address, with the host's name for the Host header and for TLS."""

    def __init__(self, host: str, port: int, address: str, *, secure: bool) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S)
        self._address, self._secure = address, secure
        self.timed_out = False
        """Whether the timeout has expired."""
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Open the socket; for https, with TLS that verifies the name of the host."""
        tcp_socket = self._socket = self.sock = socket.create_connection((self._address, self.port), TIMEOUT_S)
        if self._secure:
            # The handshake is separate, so that `abort` already knows the TLS socket and can end a slow handshake.
            context = ssl.create_default_context()
            tls_socket = context.wrap_socket(tcp_socket, server_hostname=self.host, do_handshake_on_connect=False)
            self._socket = self.sock = tls_socket
            if self.timed_out:
                raise TimeoutError
            tls_socket.do_handshake()
        elif self.timed_out:
            raise TimeoutError

    def abort(self) -> None:
        """Shut the socket down at the timeout, which also ends a transfer that arrives byte by byte."""
        self.timed_out = True
        if self._socket is not None:
            # The socket may be closed, or replaced by the TLS socket; `connect` checks `timed_out`.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _read_body(response: http.client.HTTPResponse, host: str, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read1(_CHUNK_BYTES):
        size += len(part)
        if size > max_bytes:
            raise FetchError(_size_message(host, max_bytes))
        parts.append(part)
    return b"".join(parts)


def _timeout_message(host: str) -> str:
    return f"{host}: the image did not arrive within {TIMEOUT_S:g} s"


def _size_message(host: str, max_bytes: int) -> str:
    return f"{host}: the image is larger than {max_bytes / 2**20:g} MiB"
