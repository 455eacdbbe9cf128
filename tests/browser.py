"""Headless Chromium, told what to do over a pipe: nothing listens, and nothing but the browser itself is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


class Browser:
    """One tab. events: all that it told so far, such as requests and errors."""

    def __init__(self, to: int, answers: int):
        self.to, self.answers = to, answers
        self.count, self.rest = 0, b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol -> its result; RuntimeError where it says an error."""
        self.count += 1
        asked = {"id": self.count, "method": method, "params": parameters}
        asked |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.count:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise RuntimeError("the browser ended")
            self.rest += more
        told, _, self.rest = self.rest.partition(b"\0")
        return json.loads(told)

    def open(self, page: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Shows a file in a window of that size."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self("Page.navigate", url=page.resolve().as_uri())
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        return base64.b64decode(self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    @property
    def requests(self) -> list[str]:
        """What was asked for since the page was opened."""
        sent = [
            one["params"]["request"]["url"] for one in self.events if one.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings, on the console or about the page, since it was opened."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")
        return [json.dumps(one["params"]) for one in self.events if one.get("method") in kinds]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A new one, with its profile in a folder."""
    assert CHROMIUM is not None
    heard, to = os.pipe()
    answers, said = os.pipe()

    def place() -> None:  # the protocol is on 3 and 4; first out of the way, for a pipe may have these numbers itself
        high = [os.dup2(end, 100 + end) for end in (heard, said)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    no = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=no, stdout=no, stderr=no, preexec_fn=place, close_fds=False)
    os.close(heard)
    os.close(said)
    try:
        tab = Browser(to, answers)
        yield tab
        tab.session = None
        tab("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(answers)
