"""Headless Chromium over its DevTools protocol on two pipes: no port is opened, and no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

# The browser reads orders from descriptor 3 and answers on 4
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One tab.

    Args:
        profile: a folder of its own.

    Attributes:
        console: errors and warnings of pages, and exceptions.
        requests: addresses that pages asked for.
    """

    def __init__(self, profile: Path) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._number, self._rest = 0, b""
        read, out = os.pipe()
        back, write = os.pipe()
        orders, answers = fcntl(read, F_DUPFD, 10), fcntl(write, F_DUPFD, 10)  # out of the way of 3 and 4
        self._in, self._out = back, out
        self._process = subprocess.Popen(
            [
                sys.executable, "-c", _START, str(orders), str(answers), str(CHROMIUM), "--headless", "--no-sandbox",
                "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--disable-quic", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            ],
            pass_fds=(orders, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for descriptor in (read, write, orders, answers):
            os.close(descriptor)
        target = self._send("Target.createTarget", url="about:blank", session=False)["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True, session=False)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, EOFError):
            self._send("Browser.close", session=False)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, address: str) -> None:
        """Go there; the page may still be loading."""
        self._send("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 120.0) -> Any:
        """Its value once it is true: a limit so that a test ends, not one that it asserts."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} did not become true; the console: {self.console}"
            time.sleep(0.05)
        return value

    def shape(self, width: int, height: int, *, dark: bool = False, script: bool = True) -> None:
        """The window, the colour scheme, and whether scripts run."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._send("Emulation.setScriptExecutionDisabled", value=not script)

    def picture(self) -> bytes:
        """PNG: what the window shows."""
        return base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])

    def offline(self, value: bool) -> None:
        """Cut the tab off, or connect it again."""
        self._send(
            "Network.emulateNetworkConditions", offline=value, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def _send(self, method: str, *, session: bool = True, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        order = {"id": self._number, "method": method, "params": parameters}
        order |= {"sessionId": self._session} if session else {}
        os.write(self._out, json.dumps(order).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif event == "Runtime.consoleAPICalled":
            self.console.append(f"{told['type']}: {told['args']}")
        elif event == "Log.entryAdded":
            self.console.append(f"{told['entry']['level']}: {told['entry']['text']}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            text = os.read(self._in, 1 << 16)
            if not text:
                raise EOFError("the browser ended")
            self._rest += text
        message, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded
