"""Headless Chromium over its debugging pipe, with nothing installed but Chromium itself."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page, in a context; `errors` are its exceptions, `requests` the addresses it asked."""

    def __init__(self, profile: Path):
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()
        flags = ("headless=new", "no-sandbox", "disable-gpu", "remote-debugging-pipe")
        flags += (f"user-data-dir={profile}", "no-first-run", "force-device-scale-factor=1")
        # the browser reads commands from descriptor 3 and answers on 4
        script = f'exec "$@" 3<&{child_in} 4>&{child_out} >{profile}.log 2>&1'
        command = [CHROMIUM, *(f"--{flag}" for flag in flags), "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(child_in, child_out)
        )
        os.close(child_in)
        os.close(child_out)
        self._buffer, self._n, self._session = b"", 0, {}
        self.requests, self.errors = [], []

    def __enter__(self):
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **params) -> dict:
        """The result of a command of the Chrome DevTools Protocol."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params} | self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._receive()).get("id") != self._n:
            self._note(answer.get("method"), answer.get("params"))
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, method: str, params: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:60])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])

    def open(self, path: Path, width: int = 1000, height: int = 800, dark: bool = False) -> None:
        """Load a file, on a phone if it is narrow."""
        phone = width < 700
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=2 if phone else 1, mobile=phone)  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.run("new Promise(done => document.readyState == 'complete'"
                 " ? done() : addEventListener('load', done))")  # fmt: skip

    def run(self, code: str) -> Any:
        """The value of an expression, once it is settled if it is a promise."""
        result = self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait for two frames: the page has shown what it was told."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, path: Path) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
