"""How soon a page shows a round: from the end of the round to what headless Chromium has on the page.

The rounds of the main job, watched as they end; then the same page over thousands of sites, and what a look costs.

    python benchmarks/watch.py [--quick] [--json FILE] [--check]
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

from common import Bar, Report, Timing, interleaved, parse

sys.path.insert(0, str(Path(__file__).parents[1]))

import privfed
from privfed import folder
from privfed.federation import RoundReport
from privfed.watching import Watcher
from privfed.web.page import Renderer
from privfed.web.serve import Page
from tests.privfed.browser import CHROMIUM, Browser
from tests.privfed.watched import stand_at, watched

SHOWN = "main job, 5 sites: end of a round → on the page, worst"
MANY = "{:,} sites: end of a round → on the page, worst"
SIZES = (466, 10_000)
BARS = (Bar(SHOWN, at_most=2.0), *(Bar(MANY.format(sites), at_most=2.0) for sites in SIZES))

# The page notes when each round came onto it
NOTE = """
window.came = {};
new MutationObserver(() => {
  const shown = document.querySelector('#rounds tbody th')?.textContent;
  if (shown && !(shown in came)) came[shown] = Date.now() / 1000;
}).observe(document.getElementById('rounds'), {childList: true});
"""


def main() -> None:
    options = parse(__doc__)
    report = Report("watch", packages=("starlette", "sse-starlette", "uvicorn"))
    if CHROMIUM is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch, Browser(Path(scratch) / "profile") as browser:
        main_job(report, browser, Path(scratch), rounds=5 if options.quick else 20)
        for sites in SIZES:
            many(report, browser, Path(scratch) / str(sites), sites, rounds=3 if options.quick else 10)
        report.add("errors on the browser's console", len(browser.console))
    report.finish(options, BARS)


def main_job(report: Report, browser: Browser, scratch: Path, *, rounds: int) -> None:
    """A live run; nobody waits for the page."""
    ended: dict[str, float] = {}

    def note(one: RoundReport) -> None:
        ended[str(one.round + 1)] = time.time()

    config = privfed.load_config(overrides=[f"rounds={rounds}", "privacy.noise_multiplier=4"])
    with Serving(Page(Watcher(scratch / "run"))) as page:
        browser.open(page.address)
        browser.wait("document.querySelector('h1')?.textContent == 'No run here yet'")
        browser.evaluate(NOTE)
        privfed.run(config, out=scratch / "run", observer=note)
        browser.wait("document.querySelector('h1').textContent.startsWith('Over')")
        came = browser.evaluate("came")
        browser.open("about:blank")
    report.section("A live run")
    told(report, SHOWN, delays(ended, came))


def many(report: Report, browser: Browser, home: Path, sites: int, *, rounds: int) -> None:
    """Rounds that end every second and a half, of that many sites, without the work between them."""
    names = [f"hospital-{number}" for number in range(sites)]
    watched(home, names, rounds=rounds, over=False, uneven=True)
    whole = (home / folder.METRICS).read_text().splitlines(keepends=True)
    (home / folder.METRICS).write_text("")
    stand_at(home, 0)
    ended: dict[str, float] = {}
    with Serving(Page(Watcher(home))) as page:
        browser.open(page.address)
        browser.wait("document.getElementById('rounds') != null")
        browser.evaluate(NOTE)
        for number, line in enumerate(whole, start=1):
            with (home / folder.METRICS).open("a") as file:
                file.write(line)
            stand_at(home, number)
            ended[str(number)] = time.time()
            time.sleep(1.5)
        browser.wait(f"document.querySelector('#rounds tbody th')?.textContent == '{rounds}'")
        came = browser.evaluate("came")
        browser.open("about:blank")
    report.section(f"{sites:,} sites")
    told(report, MANY.format(sites), delays(ended, came))
    watcher, renderer = Watcher(home), Renderer()
    view = watcher.look()
    parts = renderer.parts(watcher, view)
    times = interleaved({"look": watcher.look, "draw": lambda: renderer.parts(watcher, view)}, repeats=9)
    report.add(f"{sites:,} sites: a look at what did not change", times["look"])
    report.add(f"{sites:,} sites: all parts drawn", times["draw"])
    report.add(f"{sites:,} sites: a whole page", sum(len(text.encode()) for text in parts.values()) / 1000, "kB")
    report.add(f"{sites:,} sites: a line of metrics.jsonl", len(whole[0].encode()) / 1000, "kB")


def delays(ended: dict[str, float], came: dict[str, float]) -> Timing:
    """Seconds until the page had a round; where two ended between two looks, until it had the later."""
    later = {number: [moment for shown, moment in came.items() if int(shown) >= int(number)] for number in ended}
    return Timing(tuple(min(later[number]) - moment for number, moment in ended.items()))


def told(report: Report, name: str, found: Timing) -> None:
    report.add(name, found.high, "s")
    report.add(name.replace("worst", "median"), found)


class Serving:
    """Serves a page in a thread."""

    def __init__(self, page: Page) -> None:
        self._page, self._thread = page, threading.Thread(target=page.run)

    def __enter__(self) -> Page:
        self._thread.start()
        return self._page

    def __exit__(self, *error: object) -> None:
        self._page.stop()
        self._thread.join()


if __name__ == "__main__":
    main()
