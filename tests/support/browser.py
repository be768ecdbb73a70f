"""Drives a headless Chromium for tests, through a pipe (the Chrome DevTools Protocol) and without a library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

ANSWER_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The browser's executable, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page. Every request carries the user's name and password."""

    def __init__(self, folder: Path, user: str, password: str) -> None:
        executable = find()
        assert executable is not None
        (down, self._down), (self._up, up) = os.pipe(), os.pipe()

        def pipes() -> None:
            # The browser reads commands from 3 and writes to 4. Both ends are first moved out of each other's way.
            for wanted, given in ((3, os.dup(down)), (4, os.dup(up))):
                os.dup2(given, wanted)

        with open(folder / "browser.log", "wb") as log:
            self.process = subprocess.Popen(
                [executable, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                 "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--no-proxy-server",
                 f"--user-data-dir={folder / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=pipes, close_fds=False,  # noqa: PLW1509 - no threads here
                env={**os.environ, "HOME": str(folder)}, start_new_session=True,
            )  # fmt: skip
        os.close(down)
        os.close(up)
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        self._events: list[dict[str, Any]] = []
        self.errors: list[str] = []  # exceptions of the page's own scripts, and answers that are no success
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._ask(f"{domain}.enable")
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._ask("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {login}"})

    def open(self, url: str) -> None:
        """Go there, and wait until the page has loaded."""
        self._events.clear()
        answer = self._ask("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"
        deadline = time.monotonic() + ANSWER_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read(deadline)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """What can be read in the elements, in order, with single blanks."""
        code = f"Array.from(document.querySelectorAll({json.dumps(selector)})).map(e => e.innerText)"
        return [" ".join(text.split()) for text in self.value(code)]

    def await_text(self, selector: str, text: str, seconds: float = 30.0) -> list[str]:
        """Wait until one of these elements shows the text; returns what all of them show."""

        def shown() -> list[str]:
            found = self.texts(selector)
            return found if any(text in one for one in found) else []

        try:
            return wait_until(shown, seconds=seconds, what=f"{text!r} in {selector}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the page: {self.value('document.body.innerText')}") from None

    def click(self, selector: str) -> None:
        element = f"document.querySelector({json.dumps(selector)})"
        visible = "e && e.offsetParent !== null"
        wait_until(lambda: self.value(f"(e => {visible} && (e.click(), true))({element})"), what=f"{selector} to click")

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self._ask("Input.insertText", text=text)

    def key(self, name: str) -> None:
        """Press a key, as the DOM names it: ArrowRight, Enter, /."""
        codes = {
            "Enter": (13, "\r"),
            "ArrowLeft": (37, ""),
            "ArrowUp": (38, ""),
            "ArrowRight": (39, ""),
            "ArrowDown": (40, ""),
        }
        code, text = codes.get(name, (0, name))
        pressed = {"key": name, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=name)

    def mouse(self, x: float, y: float, *, press: bool = False) -> None:
        """Move the mouse to a point of the window, and click there."""
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for what in ("mousePressed", "mouseReleased") if press else ():
            self._ask("Input.dispatchMouseEvent", type=what, **at)

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """Give the window this size, and the user this taste: light or dark."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def await_value(self, expression: str, seconds: float = 30.0) -> Any:
        """Wait until a JavaScript expression is something true on the page; returns it."""
        try:
            return wait_until(lambda: self.value(expression), seconds=seconds, what=expression)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page: {self.value('document.body.innerText')}") from None

    def await_answer(self, path: str) -> None:
        """Wait until a request since the page was opened, whose URL ends so, has been answered."""

        def answered() -> bool:
            self.value("0")  # reads what has come
            received = [e["params"]["response"] for e in self._events if e["method"] == "Network.responseReceived"]
            return any(response["url"].endswith(path) for response in received)

        wait_until(answered, what=f"an answer from {path}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._session = None
        try:
            self._ask("Browser.close")
            self.process.wait(ANSWER_S)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._down)
            os.close(self._up)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_S
        while True:
            for answer in self._read(deadline):
                if answer.get("id") == self._number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    result: dict[str, Any] = answer["result"]
                    return result

    def _read(self, deadline: float) -> list[dict[str, Any]]:
        """Answers that have come; events are noted. Waits until there is something."""
        ready, _, _ = select.select([self._up], [], [], max(deadline - time.monotonic(), 0.0))
        assert ready, f"the browser says nothing for {ANSWER_S} s"
        data = os.read(self._up, 1 << 16)
        assert data, "the browser has ended"
        *messages, self._rest = (self._rest + data).split(b"\0")
        answers = []
        for message in map(json.loads, messages):
            if "id" in message:
                answers.append(message)
                continue
            self._events.append(message)
            self._note(message["method"], message["params"])
        return answers

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Network.responseReceived" and parameters["response"]["status"] >= 400:
            self.errors.append(f"{parameters['response']['status']} {parameters['response']['url']}")


@contextmanager
def browser(folder: Path, user: str, password: str) -> Iterator[Browser]:
    found = Browser(folder, user, password)
    try:
        yield found
    finally:
        found.close()
