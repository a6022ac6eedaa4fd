"""Browsers: the Host header against DNS rebinding, other origins (CORS), a proxy's path, HTTPS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPSConnection, RemoteDisconnected
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from fastserve.core.errors import ConfigError
from fastserve.server.options import ServerOptions, names_of
from support.servers import LONG_S, RunningServer, command, profile, running, simulated

# -- the Host header -------------------------------------------------------------------------------------------------


def ask_as(server: RunningServer, host: str) -> int:
    return server.get("/health", {"Host": host}).status


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LocalHost.", "a.localhost:1", "127.0.0.1", "127.0.0.1:80", "10.1.2.3", "[::1]:80"],
)
def test_loopback_names_and_addresses_are_accepted(quick: RunningServer, host: str) -> None:
    assert ask_as(quick, host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_other_names_are_refused_on_a_loopback_address(quick: RunningServer, host: str) -> None:
    reply = quick.get("/page/state", {"Host": host})
    assert (reply.status, reply.error["code"]) == (403, "host_not_allowed")
    name = host.partition(":")[0]
    assert reply.error["message"] == (
        f"this server is not known as {name!r} (Host header); start it with --allowed-hosts {name}"
    )


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        (ServerOptions(host="0.0.0.0"), "any.example", 200),
        (ServerOptions(allowed_hosts=("llm.example",)), "llm.example:80", 200),
        (ServerOptions(allowed_hosts=("llm.example",)), "localhost", 403),
        (ServerOptions(allowed_hosts=("llm.example",)), "10.0.0.1", 200),
        (ServerOptions(allowed_hosts=("*.example",)), "a.b.example", 200),
        (ServerOptions(allowed_hosts=("*.example",)), "example", 403),
        (ServerOptions(allowed_hosts=("*",)), "evil.example", 200),
    ],
)
def test_allowed_hosts(options: ServerOptions, host: str, status: int) -> None:
    with running(simulated, options) as server:
        assert ask_as(server, host) == status


# -- other origins ---------------------------------------------------------------------------------------------------

ORIGIN = "https://chat.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-request-id",
}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    with running(simulated, ServerOptions(api_key="key", allowed_origins=(ORIGIN,))) as server:
        yield server


def test_a_preflight_is_answered_without_a_key(shared: RunningServer) -> None:
    reply = shared.ask("OPTIONS", "/v1/chat/completions", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in reply.headers["access-control-allow-methods"]
    allowed = reply.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-request-id"))


def test_an_allowed_origin_can_read_errors(shared: RunningServer) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer key"}, 200)):
        reply = shared.post({"prompt": [1], "max_tokens": 1}, headers={"Origin": ORIGIN, **headers})
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in reply.headers["access-control-expose-headers"]


def test_other_origins_are_refused(shared: RunningServer, quick: RunningServer) -> None:
    reply = shared.ask("OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example", **PREFLIGHT})
    assert reply.status == 400
    assert "access-control-allow-origin" not in reply.headers
    # Without the option there is no preflight.
    assert quick.ask("OPTIONS", "/v1/completions", headers={"Origin": ORIGIN, **PREFLIGHT}).status == 405


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/path", "https://", "://x"])
def test_an_invalid_origin_is_named(origin: str) -> None:
    with pytest.raises(ConfigError, match="is no origin; give scheme, host and port"):
        ServerOptions(allowed_origins=(origin,))


def test_lists_are_repeated_options_commas_or_json() -> None:
    assert names_of(["a", "b,c , a", '["d", "e"]']) == ("a", "b", "c", "d", "e")
    with pytest.raises(ConfigError, match="must be a JSON list of texts"):
        names_of(["[1]"])
    with pytest.raises(ConfigError, match="is no JSON list"):
        names_of(['["a"'])


# -- behind a proxy --------------------------------------------------------------------------------------------------


def test_a_root_path_is_served_whether_the_proxy_strips_it_or_not() -> None:
    with running(simulated, ServerOptions(root_path="/llm")) as server:
        for prefix in ("", "/llm"):
            assert server.get(f"{prefix}/health").status == 200
            assert server.get(f"{prefix}/").status == 200
            assert server.get(f"{prefix}/page/state").status == 200
            assert server.post({"prompt": [1], "max_tokens": 1}, f"{prefix}/v1/completions").status == 200
        assert server.get("/openapi.json").json["servers"] == [{"url": "/llm"}]
        # /metrics counts both as the same path.
        assert server.metric("http_requests_total", path="/v1/completions", status="200") == 2


@pytest.mark.parametrize("path", ["llm", "/llm/", "/"])
def test_an_invalid_root_path_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="root_path must begin with / and not end with one"):
        ServerOptions(root_path=path)


# -- HTTPS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed cert.pem for localhost, its key.pem, and locked.pem, the key with a password."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    for command_line in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        "-keyout key.pem -out cert.pem",
        "rsa -in key.pem -aes128 -passout pass:secret -out locked.pem",
    ):
        subprocess.run(["openssl", *command_line.split()], cwd=folder, check=True, capture_output=True)
    return folder


def test_https_with_a_self_signed_certificate(certificate: Path, tmp_path: Path) -> None:
    profile().save(tmp_path / "quick.json")
    files = ["--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem")]
    with command("--backend", "sim", "--profile", str(tmp_path / "quick.json"), *files) as server:
        assert server.said[-1].endswith(f"at https://127.0.0.1:{server.port}")
        trusting = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        with closing(HTTPSConnection("localhost", server.port, timeout=LONG_S, context=trusting)) as connection:
            connection.request("POST", "/v1/completions", b'{"prompt": [1]}', {"Content-Type": "application/json"})
            assert connection.getresponse().status == 200
        with closing(HTTPConnection("localhost", server.port, timeout=LONG_S)) as plain:
            plain.request("GET", "/health")
            with pytest.raises((ConnectionResetError, RemoteDisconnected)):
                plain.getresponse()
        server.signal()
        assert server.end()[0] == 0


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("none.pem", "key.pem", "--ssl-certfile .*none.pem: No such file or directory"),
        ("cert.pem", "none.pem", "--ssl-keyfile .*none.pem: No such file or directory"),
        ("cert.pem", None, "are not a certificate in PEM format with its unencrypted key"),
        ("key.pem", "key.pem", "are not a certificate in PEM format with its unencrypted key"),
        ("cert.pem", "locked.pem", "are not a certificate in PEM format with its unencrypted key"),
    ],
)
def test_an_unusable_certificate_is_named(certificate: Path, cert: str, key: str | None, message: str) -> None:
    from fastserve.server.serve import require_certificate

    options = ServerOptions(ssl_certfile=certificate / cert, ssl_keyfile=None if key is None else certificate / key)
    with pytest.raises(ConfigError, match=message):
        require_certificate(options)


def test_a_key_without_a_certificate_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ssl_keyfile=k\.pem needs ssl_certfile"):
        ServerOptions(ssl_keyfile=Path("k.pem"))
