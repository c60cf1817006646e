"""The page of a run: what it shows and to whom, that it changes nothing, and that a browser keeps up with a run."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason="the page's packages are not here: pip install 'privfed[web]'")
pytest.importorskip("sse_starlette", reason="the page's packages are not here: pip install 'privfed[web]'")

import privfed
from privfed import folder
from privfed.errors import ConfigError
from privfed.federation import RoundReport
from privfed.watching import Watcher
from privfed.web.app import _MOST_AT_ONCE
from privfed.web.chart import Line, chart, ticks
from privfed.web.serve import Page
from privfed.web.visitors import MOST_STRANGERS
from tests.privfed.browser import CHROMIUM, Browser
from tests.privfed.engines.flare_rig import until
from tests.privfed.watched import stand_at, watched

SITES = ("north", "south", "west")
EVIL = '<script>alert("x")</script> <img src=x onerror=alert(1)> \u202e& "é'


@contextmanager
def serving(page: Page) -> Iterator[str]:
    """Serves it in a thread; its address."""
    thread = threading.Thread(target=page.run)
    thread.start()
    try:
        yield page.address
    finally:
        page.stop()
        thread.join(120)
        assert not thread.is_alive()


def ask(address: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    place = urlsplit(address)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)
    try:
        connection.request(method, place.path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


class Stream:
    """The events of a page, as they come."""

    def __init__(self, address: str) -> None:
        place = urlsplit(address)
        assert place.hostname is not None
        self._connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)
        self._connection.request("GET", place.path + "events")
        self.answer = self._connection.getresponse()

    def next(self) -> tuple[str, str]:
        """(part, HTML) of the next one. Raises `EOFError` at the end."""
        name, data = "", []
        while True:
            line = self.answer.readline().decode()
            if not line:
                raise EOFError
            field, _, value = line.rstrip("\r\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not line.strip() and name:
                return name, "\n".join(data)

    def until(self, part: str, text: str) -> str:
        """The first piece for that part that has the text."""
        while True:
            name, html = self.next()
            if name == part and text in html:
                return html

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


# What is shown


def test_the_page_shows_rounds_sites_figures_and_faults(tmp_path: Path) -> None:
    home = watched(
        tmp_path / "run", (*SITES, "east", "centre"), refusals={"south": "policy.max_epsilon = 2"}, over=False
    )
    with serving(Page(Watcher(home))) as address:
        status, headers, body = ask(address)
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    for words in ("Nobody works on it: 6 of 6 rounds", "ε at δ = 10⁻⁵ for each record, local noise", "internal, not DP",
                  "Round 1: <bdi>south refuses: policy.max_epsilon = 2</bdi>", "north did not answer mask", "budget 4",
                  "Global accuracy", "Personalised accuracy", '<th scope="row"><bdi>centre</bdi></th>'):  # fmt: skip
        assert words in body, words


def test_a_void_run_a_run_without_a_claim_and_noised_figures_say_so(tmp_path: Path) -> None:
    pages = {}
    for name, overrides in {
        "void": ["privacy.insecure_seed=1"],
        "none": ['privacy.unit="none"'],
        "noised": ['privacy.noise="distributed"', 'method.name="fedsgd"', 'evaluation.release="private"'],
        "local": ['method.name="local"'],
    }.items():
        step = None if name == "none" else 0.3
        home = watched(tmp_path / name, SITES, overrides=overrides, over=False, epsilon_step=step)
        with serving(Page(Watcher(home))) as address:
            pages[name] = ask(address)[2]
    assert "VOID: ε at δ" in pages["void"] and 'class="value struck"' in pages["void"]
    assert "NO PRIVACY CLAIM" in pages["none"] and "ε = " not in pages["none"]
    assert "± 0.050 by the noise; in ε" in pages["noised"] and "Personalised" not in pages["noised"]
    assert "against the server together with" in pages["noised"] and "no update leaves a site" in pages["local"]


def test_no_figure_of_a_single_site_and_no_path_stands_on_the_page(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES)
    names = (folder.METRICS, folder.CONFIG, folder.RUN, folder.REPORT, folder.LEDGER, "..", "../run/metrics.jsonl")
    with serving(Page(Watcher(home))) as address:
        body = ask(address)[2]
        assert all(ask(address + name)[0] == 404 for name in names)
    assert str(tmp_path) not in body
    rows = re.findall(r"<tr><th scope=\"row\"><bdi>.*?</tr>", body)
    assert len(rows) == 3 and not any("0." in row for row in rows)


def test_what_files_say_is_escaped(tmp_path: Path) -> None:
    home = watched(tmp_path / "run<b>", (EVIL, *SITES, "x"), refusals={EVIL: EVIL}, aborted={2: EVIL}, over=False)
    with serving(Page(Watcher(home))) as address:
        body = ask(address)[2]
        stream = Stream(address)
        sent = "".join(stream.next()[1] for _ in range(5))
        stream.close()
    assert EVIL not in body + sent and "<img" not in body + sent and "run<b>" not in body + sent
    assert "&lt;script&gt;alert(&#34;x&#34;)" in body and "&lt;script&gt;" in sent
    assert re.findall(r"<script[^>]*>", body) == ['<script src="watch.js" defer>'] and " style=" not in body + sent


def test_a_damaged_folder_is_told_without_its_path_and_looked_at_again(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    text = (home / folder.CHECKPOINT).read_bytes()
    (home / folder.CHECKPOINT).write_bytes(b"nothing")
    with serving(Page(Watcher(home))) as address:
        body = ask(address)[2]
        assert "run/checkpoint.safetensors is damaged" in body and str(tmp_path) not in body
        stream = Stream(address)
        (home / folder.CHECKPOINT).write_bytes(text)
        stream.until("standing", "6 of 6 rounds")
        stream.close()


def test_a_run_that_has_not_begun_shows_when_it_does(tmp_path: Path) -> None:
    with serving(Page(Watcher(tmp_path / "run"))) as address:
        assert "No run here yet" in ask(address)[2]
        stream = Stream(address)
        watched(tmp_path / "run", SITES, over=False)
        stream.until("standing", "6 of 6 rounds")
        stream.close()


def test_many_sites_and_many_rounds_are_shown_in_part_and_the_rest_is_counted(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(1, 601)]
    home = watched(tmp_path / "run", names, rounds=2, over=False)
    with serving(Page(Watcher(home))) as address:
        body = ask(address)[2]
    assert "600 sites; those with faults first" in body and "… and 100 more" in body
    assert body.index("<bdi>site-9</bdi>") < body.index("<bdi>site-10</bdi>")


# Events


def test_only_what_changed_is_sent_and_whoever_comes_back_gets_all(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    stand_at(home, 4)
    with serving(Page(Watcher(home))) as address:
        stream = Stream(address)
        assert stream.answer.getheader("content-type", "").startswith("text/event-stream")
        first = [stream.next()[0] for _ in range(6)]
        assert sorted(first) == ["charts", "faults", "rounds", "said", "sites", "standing"]
        stand_at(home, 5)
        changed = []
        while "rounds" not in changed:  # the last of them
            changed.append(stream.next()[0])
        assert changed == ["said", "standing", "charts", "sites", "rounds"]
        stream.close()
        again = Stream(address)
        again.until("rounds", '<th scope="row">5</th>')
        again.close()


def test_streams_end_with_the_server_and_browsers_that_left_do_not_hold_it(tmp_path: Path) -> None:
    page = Page(Watcher(watched(tmp_path / "run", SITES)))
    with serving(page) as address:
        gone = Stream(address)
        gone.close()
        stays = Stream(address)
        stays.until("standing", "Over")
        page.stop()
        with pytest.raises((EOFError, http.client.HTTPException, ConnectionError)):  # in time, or cut
            while True:
                stays.next()
        stays.close()


# Who may see it


def test_every_answer_has_its_headers(tmp_path: Path) -> None:
    with serving(Page(Watcher(watched(tmp_path / "run", SITES)))) as address:
        answers = [ask(address + name) for name in ("", "style.css", "watch.js", "icon.svg", "nothing")]
        answers += [ask(address, "POST"), ask(address[:-2] + "/")]
        stream = Stream(address)
        answers.append((stream.answer.status, dict(stream.answer.getheaders()), ""))
        stream.close()
    assert [status for status, _, _ in answers] == [200, 200, 200, 200, 404, 405, 404, 200]
    for _, headers, _ in answers:
        lower = {name.lower(): value for name, value in headers.items()}
        assert lower["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert lower["x-content-type-options"] == "nosniff" and lower["referrer-policy"] == "no-referrer"
        assert lower["cache-control"] == "no-store" and "server" not in lower and "set-cookie" not in lower


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_asked_but_to_see(tmp_path: Path, method: str) -> None:
    home = watched(tmp_path / "run", SITES)
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    with serving(Page(Watcher(home))) as address:
        assert {ask(address + name, method)[0] for name in ("", "events", "watch.js")} == {405}
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_without_the_token_or_under_another_name_nothing_is_told(tmp_path: Path) -> None:
    with serving(Page(Watcher(watched(tmp_path / "run", SITES)))) as address:
        place = urlsplit(address)
        root, token = f"http://{place.netloc}", place.path.strip("/")
        assert len(token) == 32  # 192 bits
        for path in ("/", "", f"/{token}", f"/{token[:-1]}/", f"/{token}x/", "/events", "//", f"/x/{token}/", "/é/"):
            status, _, body = ask(root + (path or "/").replace("é", "%C3%A9"))
            assert status == 404 and body == "nothing is here"
        with socket.create_connection((place.hostname, place.port), timeout=120) as connection:
            connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")  # a path without a slash
            assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
            assert ask(address, Host=host)[0] == 400
        for host in ("localhost", f"127.0.0.1:{place.port}"):
            assert ask(address, Host=host)[0] == 200
    with serving(Page(Watcher(tmp_path / "run"))) as other:
        assert urlsplit(other).path != place.path


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost: 127", b"GET /no-token/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
    ids=["nothing", "half a request", "a request without the token"],
)  # fmt: skip
def test_who_does_not_know_the_token_keeps_nobody_out(tmp_path: Path, said: bytes) -> None:
    with serving(Page(Watcher(watched(tmp_path / "run", SITES)))) as address, ExitStack() as held:
        place = urlsplit(address)
        before = Stream(address)
        for _ in range(3 * MOST_STRANGERS):
            stranger = held.enter_context(socket.create_connection((place.hostname, place.port), timeout=120))
            stranger.sendall(said)
        assert ask(address)[0] == 200
        after = Stream(address)
        for stream in (before, after):  # the one that was open is still open
            assert stream.until("standing", "Over")
            stream.close()


def test_those_who_know_the_token_are_so_many_at_once_and_no_more(tmp_path: Path) -> None:
    with serving(Page(Watcher(watched(tmp_path / "run", SITES)))) as address:
        streams = [Stream(address) for _ in range(_MOST_AT_ONCE)]
        assert [stream.answer.status for stream in streams] == [200] * _MOST_AT_ONCE
        assert ask(address)[0] == 503
        streams.pop().close()
        until(lambda: ask(address)[0] == 200)
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("remote", ["192.0.2.7", "198.51.100.1"])
def test_an_address_that_others_reach_needs_a_word(tmp_path: Path, remote: str) -> None:
    with pytest.raises(ConfigError, match="say --allow-remote"):
        Page(Watcher(tmp_path), host=remote)
    with pytest.raises(ConfigError, match="nothing can listen"):  # allowed, and not an address of this machine
        Page(Watcher(tmp_path), host=remote, allow_remote=True)


@pytest.mark.parametrize("every", ["0.0.0.0", "::", "0"])
def test_every_address_at_once_is_refused(tmp_path: Path, every: str) -> None:
    with pytest.raises(ConfigError, match="every address"):
        Page(Watcher(tmp_path), host=every, allow_remote=True)


def test_an_address_that_is_none_and_a_port_that_is_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Page(Watcher(tmp_path), host="no such host")
    page = Page(Watcher(tmp_path))
    with serving(page), pytest.raises(ConfigError, match=r"nothing can listen on 127\.0\.0\.1, port"):
        Page(Watcher(tmp_path), port=urlsplit(page.address).port or 0)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "privfed", "watch", str(watched(tmp_path / "run", SITES)), "--web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        assert urlsplit(address).hostname == "127.0.0.1" and "Over: 6 of 6 rounds" in ask(address)[2]
        stream = Stream(address)
        stream.next()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        stream.close()
    assert process.returncode == 0 and "Traceback" not in told and "Ctrl-C ends the page" in told


# Charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 4, [0, 1, 2, 3, 4]), (0.7, 0.9, [0.7, 0.75, 0.8, 0.85, 0.9]), (1, 1, [1]), (0, 1e-9, None), (3, 1000, None)],
)
def test_ticks_are_round_numbers_within(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high, 5)
    assert found == expected if expected is not None else 1 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_a_chart_is_escaped_and_no_longer_than_it_is_wide() -> None:
    points = tuple((number, 0.5, 0.0) for number in range(1, 10_001))
    drawn = chart("name", "<title>", [Line("epsilon", "<label>", points)], y="<y>", limits=(0.0, 1.0))
    assert len(drawn) < 20_000 and "<label>" not in drawn and "<y>" not in drawn and "&lt;label&gt;" in drawn
    assert "after round 10000" in drawn


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


ROUND = "document.querySelector('#rounds tbody th')?.textContent"


def test_a_browser_sees_every_round_as_it_ends_and_asks_nobody_else(tmp_path: Path, browser: Browser) -> None:
    home, seen = tmp_path / "run", threading.Semaphore(0)
    browser.console.clear()
    browser.requests.clear()

    def wait_for_the_page(report: RoundReport) -> None:
        assert seen.acquire(timeout=300)

    def run() -> None:
        quick = ("rounds=3", "evaluation.local_steps=1", "privacy.noise_multiplier=4")
        privfed.run(privfed.load_config(overrides=quick), out=home, observer=wait_for_the_page)

    with serving(Page(Watcher(home))) as address:
        browser.open(address)
        browser.wait("document.querySelector('h1')?.textContent == 'No run here yet'")
        work = threading.Thread(target=run)
        work.start()
        for number in range(1, 4):
            browser.wait(f"{ROUND} == '{number}'")
            assert browser.evaluate("document.querySelectorAll('svg.live').length") == 2
            seen.release()
        browser.wait("document.querySelector('h1').textContent == 'Over: 3 of 3 rounds'")
        work.join()
        assert browser.evaluate("document.title").startswith("3/3 · run")
        assert browser.evaluate("document.getElementById('said').textContent") == "The run is over: 3 of 3 rounds."
        assert browser.evaluate("document.getElementById('lost').hidden")
        assert all(asked.startswith(address) for asked in browser.requests) and len(browser.requests) >= 4
        browser.open("about:blank")
    assert browser.console == []


def test_a_browser_runs_nothing_that_a_file_says(tmp_path: Path, browser: Browser) -> None:
    browser.console.clear()
    home = watched(tmp_path / "run", (EVIL, *SITES, "x"), refusals={EVIL: EVIL}, aborted={2: EVIL}, over=False)
    with serving(Page(Watcher(home))) as address:
        browser.open(address)
        browser.wait(f"{ROUND} == '6'")
        names = browser.evaluate("[...document.querySelectorAll('#sites tbody bdi')].map(e => e.textContent)")
        assert EVIL in names and browser.evaluate("document.querySelectorAll('img').length") == 0
        browser.open("about:blank")
    assert browser.console == []


def test_a_browser_that_lost_the_server_says_so_and_comes_back(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privfed.web.serve.secrets.token_urlsafe", lambda _: "a-token-that-stays")
    home = watched(tmp_path / "run", SITES, over=False)
    stand_at(home, 4)
    first = Page(Watcher(home))
    with serving(first) as address:
        browser.open(address)
        browser.wait(f"{ROUND} == '4' && document.getElementById('lost').hidden")
    browser.wait("!document.getElementById('lost').hidden")
    stand_at(home, 5)
    with serving(Page(Watcher(home), port=urlsplit(address).port or 0)):
        browser.wait(f"{ROUND} == '5' && document.getElementById('lost').hidden")
        browser.open("about:blank")


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_light_and_dark_wide_and_narrow(tmp_path: Path, browser: Browser, width: int) -> None:
    home = watched(tmp_path / "run", (EVIL, *SITES, "x"), refusals={EVIL: EVIL * 5}, over=False)
    with serving(Page(Watcher(home))) as address:
        papers = []
        for dark in (False, True):
            browser.shape(width, 900, dark=dark)
            browser.open(address)
            browser.wait(f"{ROUND} == '6' && document.readyState == 'complete'")
            assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            papers.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert browser.evaluate("getComputedStyle(document.querySelector('.line')).stroke") != "none"
        assert papers == ["rgb(255, 255, 255)", "rgb(20, 24, 29)"]
        browser.shape(1200, 900)
        browser.open("about:blank")


def test_without_scripts_the_page_shows_how_it_stood(tmp_path: Path, browser: Browser) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    with serving(Page(Watcher(home))) as address:
        browser.shape(1200, 900, script=False)
        browser.open(address)
        browser.wait(f"{ROUND} == '6' && document.readyState == 'complete'")
        assert "refresh" in browser.evaluate("document.querySelector('noscript').outerHTML")
        browser.shape(1200, 900)
        browser.open("about:blank")
