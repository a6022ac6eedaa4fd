"""The live page in headless Chromium, with a server whose state the test sets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fastserve.server.monitoring.latencies import summarize
from fastserve.server.options import ServerOptions
from fastserve.server.pages import document
from support.servers import LONG_S, RunningServer, simulated
from support.servers import running as running_server

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect.set_options(timeout=1000 * LONG_S)

State = dict[str, Any]

PAGE = document("page")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
HOSTILE = "<img src=x onerror='window.hacked=1'></script><b>&amp;"
LIVE, LOST, LOCKED = '[data-connection="live"]', '[data-connection="lost"]', '[data-connection="locked"]'


def only_by_hash() -> str:
    """A content security policy that lets the page's own styles and script run, and nothing else."""

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in blocks
        )

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def a_state(**changes: Any) -> State:
    """Return the state of a server that has just started."""
    totals = dict.fromkeys(
        ["requests", "finished", "aborted", "failed", "output_tokens", "iterations", "preemptions"], 0
    )
    return {
        "model": "opt-125m",
        "policy": "fastserve",
        "status": "ready",
        "error": "",
        "uptime_s": 12.3,
        "now_s": 12.1,
        "max_batch_size": 16,
        "queues": [],
        "running": [],
        "gpu": {"blocks": 64, "free": 64},
        "host": {"blocks": 256, "free": 256},
        "block_size": 16,
        "block_bytes": 589_824,
        "moving": {"out": 0, "in": 0},
        "totals": totals | {"swap_out_bytes": 0, "swap_in_bytes": 0},
        "recent": [],
        "last_minute": {name: summarize([]) for name in ("ttft_s", "tpot_s", "jct_s")},
    } | changes


def running(request_id: str, **changes: Any) -> State:
    return {
        "id": request_id,
        "level": 1,
        "prompt_tokens": 12,
        "output_tokens": 40,
        "age_s": 1.25,
        "preemptions": 2,
    } | changes


def ended(request_id: str, **changes: Any) -> State:
    return {
        "id": request_id,
        "status": "finished",
        "finish_reason": "length",
        "prompt_tokens": 12,
        "output_tokens": 64,
        "ttft_s": 0.125,
        "jct_s": 2.3,
        "preemptions": 1,
        "finished_s": 11.0,
    } | changes


class StandIn(ThreadingHTTPServer):
    """Serves the page, and `next_state()` as its state, once a poll."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.next_state: Callable[[], State] = a_state
        self.key: str | None = None
        self.broken: HTTPStatus | None = None
        """Status of its answer instead of a state."""
        self.gone = False
        """Whether it closes connections without an answer."""
        self.polls = 0
        self.security = only_by_hash()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def say(self, **changes: Any) -> None:
        """Set the state."""
        self.next_state = lambda: a_state(**changes)


class Answer(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.server.gone:
            return
        if self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.encode())
        elif self.path != "/page/state":
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"")
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._answer(HTTPStatus.UNAUTHORIZED, "text/plain", b"")
        elif self.server.broken:
            self._answer(self.server.broken, "text/plain", b"no state")
        else:
            self.server.polls += 1
            self._answer(HTTPStatus.OK, "application/json", json.dumps(self.server.next_state()).encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.security)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are counted, not logged."""


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def tab(browser: Browser, url: str) -> Iterator[Page]:
    """A tab for the server at `url`. No error may occur but failed polls, and no other server is contacted."""
    wrong: list[str] = []
    asked: set[str] = set()
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        page.set_default_timeout(1000 * LONG_S)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        # Chromium writes an error for a failed poll, located at its address.
        page.on("console", lambda said: None if said.location["url"] == url + "page/state" else wrong.append(said.text))
        yield page
    assert wrong == []
    assert asked <= {url, url + "page/state"}


@pytest.fixture
def page(browser: Browser, server: StandIn) -> Iterator[Page]:
    with tab(browser, server.url) as page:
        # Shorten the time between polls.
        page.add_init_script(
            """const setLater = window.setTimeout;
            window.setTimeout = (action, ms) => setLater(action, ms === 330 ? 50 : ms);"""
        )
        yield page


def open_page(page: Page, server: StandIn) -> None:
    page.goto(server.url)
    page.wait_for_selector(LIVE)


def cells(page: Page, row: str) -> list[str]:
    return page.locator(row).locator("th, td").all_inner_texts()


def rate(page: Page, name: str) -> Any:
    return page.locator(f'[data-rate="{name}"] .now')


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def hide(page: Page, hidden: bool) -> None:
    """Hide or show the page as a browser does when the user switches tabs."""
    page.evaluate(
        """hidden => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def test_the_state_is_shown(page: Page, server: StandIn) -> None:
    server.say(
        uptime_s=3_725.9,
        queues=[
            {"level": 0, "fresh": 3, "resident": 2, "away": 1},
            {"level": 2, "fresh": 0, "resident": 1, "away": 4},
        ],
        running=[running("cmpl-a"), running("cmpl-b", level=0, preemptions=0)],
        gpu={"blocks": 64, "free": 10},
        host={"blocks": 4096, "free": 2048},
        moving={"out": 1, "in": 0},
        recent=[ended("cmpl-d"), ended("cmpl-c", status="aborted", finish_reason="abort", ttft_s=None)],
    )
    open_page(page, server)
    expect(page).to_have_title("opt-125m · FastServe")
    expect(page.locator("#model")).to_have_text("opt-125m")
    expect(page.locator("#policy")).to_have_text("fastserve")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#uptime")).to_have_text("1 h 2 min")
    expect(page.locator("#error")).to_be_hidden()

    assert cells(page, '#queues [data-key="0"]') == ["0", "", "3", "2", "1"]
    assert cells(page, '#queues [data-key="1"]') == ["1", "", "0", "0", "0"]  # left out by the server
    assert cells(page, '#queues [data-key="2"]') == ["2", "", "0", "1", "4"]
    assert cells(page, "#queues-all") == ["All", "", "3", "3", "5"]
    widths = page.eval_on_selector_all(
        '#queues [data-key="0"] .bar span', "spans => spans.map(span => parseFloat(span.style.width))"
    )
    assert widths == [30, 20, 10]

    expect(page.locator("#running-count")).to_have_text("2 of 16 places")
    assert page.locator("#places .taken").count() == 2
    assert page.locator("#places span").count() == 16
    assert cells(page, '#running [data-key="cmpl-a"]') == ["cmpl-a", "1", "12", "40", "1.3", "2"]
    expect(page.locator("#gpu .blocks")).to_have_text("54 of 64 blocks")
    expect(page.locator("#gpu .bytes")).to_have_text("31.9 of 37.7 MB")
    expect(page.locator("#gpu .tokens")).to_have_text("864 of 1,024 tokens")
    expect(page.locator("#host .bytes")).to_have_text("1.2 of 2.4 GB")
    expect(page.locator("#moving")).to_have_text("blocks moving: 1 out, 0 in")
    recent = page.locator("#recent tbody tr")
    assert recent.evaluate_all("rows => rows.map(row => row.dataset.key)") == ["cmpl-d", "cmpl-c"]
    assert cells(page, '#recent [data-key="cmpl-d"]') == [
        *("cmpl-d", "finished: length", "12", "64", "0.13", "2.30", "1", "1"),
    ]
    assert cells(page, '#recent [data-key="cmpl-c"]')[1:5] == ["aborted", "12", "64", "–"]


def test_the_page_follows_the_server(page: Page, server: StandIn) -> None:
    open_page(page, server)
    expect(page.get_by_text("Nothing is running.")).to_be_visible()
    expect(page.get_by_text("No request has ended yet.")).to_be_visible()
    expect(page.locator("#running-count")).to_have_text("0 of 16 places")

    server.say(queues=[{"level": 5, "fresh": 1, "resident": 0, "away": 0}], running=[running("a"), running("b")])
    expect(page.locator("#running tbody tr")).to_have_count(2)
    expect(page.get_by_text("Nothing is running.")).to_be_hidden()
    expect(page.locator("#queues tbody tr")).to_have_count(6)
    page.evaluate("window.kept = document.querySelector('#running [data-key=b]')")

    server.say(running=[running("c"), running("b", output_tokens=41)], recent=[ended("a")])
    expect(page.locator('#recent [data-key="a"]')).to_be_visible()
    assert page.locator("#running tbody tr").evaluate_all("rows => rows.map(row => row.dataset.key)") == ["c", "b"]
    assert cells(page, '#running [data-key="b"]')[3] == "41"
    assert page.evaluate("window.kept === document.querySelector('#running [data-key=b]')")
    expect(page.locator("#queues tbody tr")).to_have_count(6)  # rows stay where they are
    assert cells(page, '#queues [data-key="5"]') == ["5", "", "0", "0", "0"]

    server.say(status="draining")
    expect(page.locator("#status")).to_have_text("draining")
    server.say(status="failed", error="rank 1 was lost")
    expect(page.get_by_role("alert").get_by_text("rank 1 was lost")).to_be_visible()


def test_many_levels_share_a_row(page: Page, server: StandIn) -> None:
    server.say(queues=[{"level": 7 * number, "fresh": 1, "resident": 2, "away": 0} for number in range(40)])
    open_page(page, server)
    rows = page.locator("#queues tbody tr")
    expect(rows).to_have_count(16)
    assert rows.nth(14).locator("th").inner_text() == "98"
    assert cells(page, "#queues tbody tr:last-child") == ["105–273", "", "25", "50", "0"]
    assert cells(page, "#queues-all") == ["All", "", "40", "80", "0"]


class Steady:
    """A server whose totals grow at a constant rate, by a clock that the test sets."""

    def __init__(self, second: int, tokens_per_second: int) -> None:
        self.second = second
        self.tokens_per_second = tokens_per_second

    def __call__(self) -> State:
        totals = a_state()["totals"]
        totals["output_tokens"] = self.tokens_per_second * self.second
        totals["requests"] = 2 * self.second
        totals["preemptions"] = self.second // 2
        totals["swap_out_bytes"] = 3_000_000 * self.second
        totals["swap_in_bytes"] = 1_000_000 * self.second
        return a_state(uptime_s=float(self.second), totals=totals)


def test_rates_are_differences_of_totals(page: Page, server: StandIn) -> None:
    server.next_state = steady = Steady(100, tokens_per_second=50)
    open_page(page, server)
    expect(rate(page, "output_tokens")).to_have_text("–")  # one sample makes no rate
    steady.second = 101
    expect(rate(page, "output_tokens")).to_have_text("50.0")
    expect(rate(page, "requests")).to_have_text("2.00")
    expect(rate(page, "swap")).to_have_text("4.00")
    expect(page.locator('[data-rate="swap"] .detail')).to_have_text("303.0 MB out, 101.0 MB in")
    steady.second = 104
    expect(rate(page, "preemptions")).to_have_text(
        "0.67"
    )  # 2 in 3 seconds, since there is no sample of two seconds ago
    expect(page.get_by_role("img", name="Output tokens/s in the last minute: now 50.0, at most 50.0")).to_be_visible()
    line = page.locator('[data-rate="output_tokens"] polyline')
    expect(line).to_have_attribute("points", "57.00,0.00 60.00,0.00")
    steady.second = 162
    expect(line).to_have_attribute("points", "2.00,0.00 60.00,0.00")  # of the last minute

    # A new server at the same address: its totals are not compared with those of the old one.
    server.next_state = steady = Steady(3, tokens_per_second=10)
    expect(rate(page, "output_tokens")).to_have_text("–")
    steady.second = 5
    expect(rate(page, "output_tokens")).to_have_text("10.0")


def test_sparklines_have_a_scale(page: Page, server: StandIn) -> None:
    server.next_state = steady = Steady(100, tokens_per_second=50)
    open_page(page, server)
    tile = page.locator('[data-rate="output_tokens"] .scale span')
    assert tile.all_inner_texts() == ["", "0"]
    steady.second = 101
    expect(tile.first).to_have_text("50.0")
    steady.tokens_per_second, steady.second = 60, 103  # 6,180 tokens, after 5,050
    expect(tile.first).to_have_text("565")
    assert tile.all_inner_texts() == ["565", "0"]


def test_latencies_of_the_last_minute(page: Page, server: StandIn) -> None:
    open_page(page, server)
    expect(rate(page, "ttft")).to_have_text("–")
    expect(page.locator('[data-rate="ttft"] .detail')).to_have_text("no request")
    assert cells(page, '#latencies [data-key="jct_s"]') == ["To the last token", "–", "–", "–", "–", "0"]
    latencies = {
        "ttft_s": summarize([0.01 * number for number in range(1, 101)]),
        "tpot_s": summarize([0.02]),
        "jct_s": summarize([1.5, 20.0]),
    }
    server.say(uptime_s=13.0, last_minute=latencies)
    expect(rate(page, "ttft")).to_have_text("0.95")
    expect(page.locator('[data-rate="ttft"] .detail')).to_have_text("P50 0.50, 100 requests")
    assert cells(page, '#latencies [data-key="ttft_s"]') == [
        *("To the first token", "0.505", "0.500", "0.950", "0.990", "100")
    ]
    assert cells(page, '#latencies [data-key="tpot_s"]')[1:] == ["0.020", "0.020", "0.020", "0.020", "1"]
    assert cells(page, '#latencies [data-key="jct_s"]')[1:] == ["10.75", "1.50", "20.00", "20.00", "2"]


def test_unfinished_requests_are_drawn_by_where_their_caches_are(page: Page, server: StandIn) -> None:
    queues = [{"level": 0, "fresh": 1, "resident": 2, "away": 0}, {"level": 3, "fresh": 0, "resident": 0, "away": 5}]
    server.say(uptime_s=50.0, queues=queues)
    open_page(page, server)
    expect(page.get_by_role("img", name="Unfinished requests in the last minute: now 8, at most 8")).to_be_visible()
    server.say(uptime_s=60.0, queues=queues[:1])
    expect(page.get_by_role("img", name="Unfinished requests in the last minute: now 3, at most 8")).to_be_visible()
    expect(page.locator("#chart .most")).to_have_text("8")
    # Ten seconds ago and now: 2 of 8 on the GPU, then 2 + 5 and 2, then all.
    outlines = page.locator("#chart polygon").evaluate_all("all => all.map(one => one.getAttribute('points'))")
    assert outlines == [
        "50.00,75.00 60.00,75.00 60.00,100.00 50.00,100.00",
        "50.00,12.50 60.00,75.00 60.00,75.00 50.00,75.00",
        "50.00,0.00 60.00,62.50 60.00,75.00 50.00,12.50",
    ]


@pytest.mark.parametrize(
    ("queues", "levels", "says"),
    [
        ([], [], "level 0 is served first"),
        ([(0, 2, 3, 0)], [0], "level 0 is served first"),
        ([(0, 0, 0, 12), (2, 0, 4, 0)], [2, 2], "level 0: 12 wait for their caches; level 2 runs"),
        (
            [(0, 3, 0, 12), (2, 0, 4, 0)],
            [4, 2],
            "level 0: 12 wait for their caches, 3 wait for room in the cache; levels 2 to 4 run",
        ),
        ([(0, 0, 0, 0), (1, 0, 2, 0), (2, 0, 4, 0)], [2], "level 1: 2 wait for the next iteration; level 2 runs"),
        ([(0, 0, 0, 12), (2, 0, 4, 0)], [], "level 0 is served first"),
    ],
)
def test_the_page_says_why_a_later_level_runs(
    page: Page, server: StandIn, queues: list[tuple[int, int, int, int]], levels: list[int], says: str
) -> None:
    keys = ("level", "fresh", "resident", "away")
    server.say(
        queues=[dict(zip(keys, queue, strict=True)) for queue in queues],
        running=[running(f"r{number}", level=level) for number, level in enumerate(levels)],
    )
    open_page(page, server)
    expect(page.locator("#queues-order")).to_have_text(says)


@pytest.mark.parametrize("width", [1400, 1280, 800])
def test_the_columns_have_about_the_same_height(page: Page, server: StandIn, width: int) -> None:
    server.say(
        queues=[{"level": level, "fresh": 1, "resident": 1, "away": 1} for level in range(10)],
        running=[running(f"r{number}") for number in range(16)],
        recent=[ended(f"e{number}") for number in range(20)],
    )
    page.set_viewport_size({"width": width, "height": 1000})
    open_page(page, server)
    lengths = page.locator(".column").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    if width >= 960:
        assert min(lengths) > 0.9 * max(lengths)
    assert fits(page)


def test_text_of_the_server_is_never_markup(page: Page, server: StandIn) -> None:
    server.say(
        model=HOSTILE,
        policy=HOSTILE,
        status=HOSTILE,
        error=HOSTILE,
        queues=[{"level": HOSTILE, "fresh": 1, "resident": 0, "away": 0}],
        running=[running(HOSTILE, level=HOSTILE)],
        recent=[ended(HOSTILE, status=HOSTILE), ended(HOSTILE + "2", finish_reason=HOSTILE)],
    )
    open_page(page, server)
    for place in ("#model", "#policy", "#status", "#error", "#running tbody th", "#recent tbody tr:first-child th"):
        expect(page.locator(place)).to_have_text(HOSTILE)
    expect(page).to_have_title(f"{HOSTILE} · FastServe")
    assert page.locator("img, b").count() == 0
    assert page.evaluate("window.hacked") is None


def test_the_page_reconnects(page: Page, server: StandIn) -> None:
    open_page(page, server)
    page.evaluate("window.loadedOnce = true")
    # It does not try again by itself before the button is clicked.
    page.evaluate("const soon = setTimeout; window.setTimeout = (action, ms) => ms < 500 ? soon(action, ms) : 0")
    server.gone = True
    page.wait_for_selector(LOST)
    expect(page.get_by_role("status")).to_contain_text("Connection lost")
    expect(page.get_by_role("status")).to_contain_text("the server does not answer")
    assert float(page.locator("main").evaluate("main => getComputedStyle(main).opacity")) < 0.6
    expect(page.locator("#model")).to_have_text("opt-125m")  # what was last known stays

    server.say(model="opt-tiny")
    server.gone = False
    page.get_by_role("button", name="Try now").click()
    page.wait_for_selector(LIVE)
    expect(page.locator("#model")).to_have_text("opt-tiny")
    expect(page.locator("#connection")).to_be_hidden()
    assert page.locator("main").evaluate("main => getComputedStyle(main).opacity") == "1"
    assert page.evaluate("window.loadedOnce")


def test_an_invalid_state_is_reported(page: Page, server: StandIn) -> None:
    server.broken = HTTPStatus.SERVICE_UNAVAILABLE
    page.goto(server.url)
    expect(page.locator("#connection")).to_contain_text("the server answers 503")
    server.broken = None
    page.wait_for_selector(LIVE)
    server.broken = HTTPStatus.OK
    expect(page.locator("#connection")).to_contain_text("the server's answer is not a state")


def test_retries_slow_down(page: Page, server: StandIn) -> None:
    waits: list[float] = []
    page.expose_function("told", lambda ms: waits.append(ms))
    # Each timer is recorded and fires at once.
    page.add_init_script(
        """const setAtOnce = window.setTimeout;
        window.setTimeout = (action, ms) => { window.told(ms); return setAtOnce(action, 0); };"""
    )
    server.broken = HTTPStatus.SERVICE_UNAVAILABLE
    page.goto(server.url)
    page.wait_for_selector(LOST)
    while len(waits) < 8:
        page.wait_for_event("requestfinished")
    assert waits[:8] == [0, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]
    server.broken = None
    page.wait_for_selector(LIVE)
    polls = server.polls
    while server.polls < polls + 3:
        page.wait_for_event("requestfinished")
    assert waits[-1] == 330


def test_a_hidden_tab_does_not_poll(page: Page, server: StandIn) -> None:
    page.clock.install()
    open_page(page, server)
    hide(page, True)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    server.say(model="opt-tiny")
    hide(page, False)
    expect(page.locator("#model")).to_have_text("opt-tiny")


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(page: Page, server: StandIn) -> None:
    server.key = "secret-1"
    page.goto(server.url)
    page.wait_for_selector(LOCKED)
    field, button = page.get_by_label("The API key"), page.get_by_role("button", name="Show the page")
    expect(field).to_be_focused()
    expect(page.locator("main")).to_be_hidden()
    assert field.get_attribute("type") == "password"

    field.fill("wrong")
    button.click()
    expect(page.get_by_role("alert").get_by_text("does not accept this key")).to_be_visible()
    field.fill("no key: ключ")  # no header can carry it
    button.click()
    assert not field.evaluate("field => field.checkValidity()")

    field.fill("  secret-1 ")
    button.click()
    page.wait_for_selector(LIVE)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("opt-125m")
    page.reload()
    page.wait_for_selector(LIVE)
    assert page.evaluate("Object.values(sessionStorage)") == ["secret-1"]
    assert page.evaluate("localStorage.length") == 0

    server.key = "secret-2"
    page.wait_for_selector(LOCKED)
    assert page.evaluate("sessionStorage.length") == 0


def test_names_and_roles_for_screen_readers(page: Page, server: StandIn) -> None:
    server.say(gpu={"blocks": 64, "free": 10}, running=[running("a")], recent=[ended("b")])
    open_page(page, server)
    expect(page.locator("html")).to_have_attribute("lang", "en")
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["opt-125m"]
    headings = ["Queues by level", "KV cache", "Unfinished requests", "Latency in the last minute", "Running batch"]
    headings.append("Recent requests")
    assert page.get_by_role("heading", level=2).all_inner_texts() == headings
    for name in ("Queues by level", "Running batch", "Recent requests"):
        expect(page.get_by_role("table", name=name)).to_be_visible()
        expect(page.get_by_role("region", name=name, exact=True)).to_be_visible()
    assert page.get_by_role("columnheader").all_inner_texts()[:4] == ["Level", "No cache", "On GPU", "On host"]
    meter = page.get_by_role("meter", name="GPU blocks in use")
    for name, value in {"valuemin": "0", "valuemax": "64", "valuenow": "54", "valuetext": "54 of 64 blocks"}.items():
        expect(meter).to_have_attribute(f"aria-{name}", value)
    # A region that scrolls can be focused with the keyboard.
    page.locator("#running-box").focus()
    expect(page.get_by_role("region", name="Running requests")).to_be_focused()


# Of each text its own colour and that of what it stands on: the contrast of WCAG 2, at its lowest.
LOWEST_CONTRAST = """() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255)
            .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
        const colour = getComputedStyle(element).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : colour;
    };
    const texts = [...document.querySelectorAll("body *")].filter(element => element.checkVisibility()
        && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
    return Math.min(...texts.map(element => {
        const [low, high] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    }));
}"""


def test_text_is_readable_in_light_and_in_dark(page: Page, server: StandIn) -> None:
    open_page(page, server)
    grounds = set()
    for status, error in {"ready": "", "draining": "", "failed": "why"}.items():
        server.say(status=status, error=error, running=[running("a")], recent=[ended("b")])
        expect(page.locator("#status")).to_have_attribute("data-status", status)
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            grounds.add(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
            assert page.evaluate(LOWEST_CONTRAST) >= 4.5
    assert len(grounds) == 2


def test_nothing_is_wider_than_the_window(page: Page, server: StandIn) -> None:
    long = "x" * 200
    server.say(
        model=long,
        policy=long,
        error=long,
        max_batch_size=256,
        queues=[{"level": level, "fresh": 12_345, "resident": 256, "away": 12_345} for level in range(16)],
        running=[running(f"cmpl-{long}{number}", preemptions=12_345) for number in range(100)],
        gpu={"blocks": 1_000_000, "free": 1},
        recent=[ended(f"cmpl-{long}{number}", jct_s=1_234.5) for number in range(20)],
        totals=dict.fromkeys(a_state()["totals"], 10**12),
    )
    open_page(page, server)
    for width in (1280, 768, 390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        assert fits(page)
        for table in ("#queues", "#running", "#recent"):
            spare = "table => table.parentElement.clientWidth - table.offsetWidth"
            assert page.locator(table).evaluate(spare) >= 0, f"{table} at {width}"
    server.gone = True
    page.wait_for_selector(LOST)
    assert fits(page)


KEY = "a-key"
ALL_IN_QUEUES = """expected => {
    const numbers = [...document.querySelectorAll("#queues-all td")].slice(1).map(cell => Number(cell.textContent));
    return numbers.reduce((all, number) => all + number, 0) === expected;
}"""


def begin_stream(server: RunningServer, max_tokens: int) -> HTTPConnection:
    """Start a streamed completion."""
    body = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=LONG_S)
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


@pytest.fixture
def real_server() -> Iterator[RunningServer]:
    """A server with a simulated model that generates fifty tokens a second for each request; it requires KEY."""
    with running_server(lambda: simulated(iteration_s=0.02), ServerOptions(api_key=KEY)) as server:
        yield server


def test_requests_of_a_real_server_appear(browser: Browser, real_server: RunningServer) -> None:
    with tab(browser, real_server.url + "/") as page, ExitStack() as streams:
        page.goto(real_server.url)
        page.get_by_label("The API key").fill(KEY)
        page.get_by_role("button", name="Show the page").click()
        page.wait_for_selector(LIVE)
        expect(page.locator("#model")).to_have_text("quick")
        expect(page.locator("#status")).to_have_text("ready")

        # More requests than a batch holds; they run until they are closed.
        longest = [streams.enter_context(closing(begin_stream(real_server, 3000))) for _ in range(20)]
        expect(page.locator("#running-count")).to_have_text("16 of 16 places")
        expect(page.locator("#running tbody tr")).to_have_count(16)
        page.wait_for_function(ALL_IN_QUEUES, arg=20)
        expect(rate(page, "output_tokens")).not_to_have_text(re.compile("^(–|0.00)$"))
        expect(page.locator("#gpu .blocks")).not_to_have_text(re.compile("^0 of"))

        with closing(begin_stream(real_server, 5)) as short:
            assert short.getresponse().read().endswith(b"data: [DONE]\n\n")
        finished = page.locator("#recent tbody tr").filter(has_text="finished: length")
        expect(finished).to_have_count(1)
        assert finished.locator("td").all_inner_texts()[1:3] == ["3", "5"]

        for stream in longest:
            stream.close()
        expect(page.locator("#recent tbody tr").filter(has_text="aborted")).to_have_count(20)
        expect(page.locator("#ended-count")).to_have_text("in all 1 finished, 20 aborted, 0 failed")
        expect(page.get_by_text("Nothing is running.")).to_be_visible()
        expect(page.locator("#gpu .blocks")).to_have_text(re.compile("^0 of"))


def test_the_interface_is_shown_without_a_network(browser: Browser, real_server: RunningServer) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = context.new_page()
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{real_server.url}/docs")
        expect(page.get_by_role("heading", level=1)).to_contain_text("FastServe")
        paths = real_server.get("/openapi.json").json["paths"]
        expect(page.locator("details")).to_have_count(sum(map(len, paths.values())))
        chat = page.locator("details").filter(has_text="/v1/chat/completions")
        chat.locator("summary").click()
        for text in ("messages", "list of ChatMessage", "max_completion_tokens", "The newer name of", "429"):
            expect(chat.get_by_text(text).first).to_be_visible()
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert fits(page)
        assert wrong == []
        assert set(asked) == {f"{real_server.url}/docs", f"{real_server.url}/openapi.json"}
