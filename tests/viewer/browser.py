"""A headless Chromium that a test can drive, over its debugging pipe."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_S = 60
WIDTH_PX, HEIGHT_PX = 1204, 800


class NavigatedError(Exception):
    """The page that an expression was asked of is no longer there."""


class Browser:
    """One page of WIDTH_PX x HEIGHT_PX."""

    def __init__(self, profile: Path) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        assert CHROMIUM is not None
        command = (
            f'exec 3<&{to_read} 4>&{to_write}; exec "$0" --headless --no-sandbox --disable-gpu '
            '--hide-scrollbars --remote-debugging-pipe --user-data-dir="$1"'
        )
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, CHROMIUM, str(profile)],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        opened = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = opened["sessionId"]
        self._call("Runtime.enable")
        self._call("Log.enable")
        size = {"width": WIDTH_PX, "height": HEIGHT_PX}
        self._call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, url: str) -> None:
        """Go to a page."""
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true; the page may be left for another meanwhile."""
        end = time.monotonic() + PATIENCE_S
        while not self._holds(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.1)

    def _holds(self, condition: str) -> bool:
        try:
            return bool(self.run(condition))
        except NavigatedError:
            return False

    def settled(self) -> None:
        """Wait until the viewer has drawn everything it wants."""
        self.run(
            "new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f))).then(()=>0)"
        )
        self.wait("document.body?.dataset.state === 'idle'")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event: mousePressed, mouseReleased, mouseMoved or mouseWheel."""
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self) -> np.ndarray[Any, Any]:
        """(h, w, 3) uint8 of the page."""
        data = base64.b64decode(self._call("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                error = answer.get("error", {})
                if "navigated" in error.get("message", ""):
                    raise NavigatedError(error)
                assert not error, error
                return dict(answer["result"])
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(first))
