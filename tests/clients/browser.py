"""A page in headless Chromium, that of Qt WebEngine, which pip brings. As a program, this is the browser.

    QT_QPA_PLATFORM=offscreen python tests/clients/browser.py PAGE.html WIDTH [PICTURE.png]

prints what it saw as JSON: warnings and errors of the console, addresses that were asked for beyond the
page's own file, widths, colours, elements that stick out of the page, and what maps of experts tell of their
first cell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HEIGHT = 900
SECONDS = 120

LOOK = r"""
(() => {
  const style = getComputedStyle(document.body), width = document.documentElement.clientWidth;
  const out = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".wide") && !e.ownerSVGElement
    && e.getBoundingClientRect().right > width + 0.5).map(e => e.tagName + ": " + e.textContent.slice(0, 40));
  const pictures = [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect());
  const tips = [...document.querySelectorAll(".cells")].map(e => {
    const r = e.getBoundingClientRect(), at = { clientX: r.left + 1, clientY: r.top + 1, bubbles: true };
    e.dispatchEvent(new PointerEvent("pointermove", at));
    const told = document.getElementById("tip").textContent;
    e.dispatchEvent(new PointerEvent("pointerleave"));
    return told;
  });
  return JSON.stringify({
    tips,
    title: document.title, width, scroll_width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight, background: style.backgroundColor, ink: style.color,
    inks: [...new Set([...document.querySelectorAll("svg text")].map(e => getComputedStyle(e).fill))], out,
    pictures: pictures.map(r => [r.width, r.height]),
  });
})()
"""


def look(page: Path, width: int, dark: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """What Chromium saw; RuntimeError with its words when it cannot run here."""
    words = [sys.executable, __file__, str(page), str(width)]
    # A root user, as in containers, has no sandbox to be put into. 0 is dark, 1 light.
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={int(not dark)}"
    own = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    done = subprocess.run(
        [*words, *([str(picture)] if picture else [])],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * SECONDS,
        env={**os.environ, **own},
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip()[-600:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(page: str, width: str, picture: str = "") -> None:
    """Look at the page, print, exit; 2 when it takes too long."""
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app = QApplication(sys.argv[:1])
    console: list[str] = []
    asked: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            if level != QWebEnginePage.JavaScriptConsoleMessageLevel.InfoMessageLevel:
                console.append(f"{message} ({source}:{line})")

    class Listener(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            asked.append(info.requestUrl().toString())
            info.block(info.requestUrl().scheme() not in ("file", "data"))

    view = QWebEngineView()
    listener, shown = Listener(), Page(view)
    shown.setUrlRequestInterceptor(listener)
    view.setPage(shown)
    # A phone's bars lie over the page and take no width.
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    # Else Chromium refuses before the listener hears of it.
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)
    view.resize(int(width), HEIGHT)
    view.show()

    def loaded(good: bool) -> None:
        if not good:
            print(f"{page}: not loaded", file=sys.stderr)
            app.exit(1)
        else:
            QTimer.singleShot(300, lambda: shown.runJavaScript(LOOK, seen))  # the first frame is on its way

    def seen(text: str) -> None:
        found = json.loads(text)
        own = QUrl.fromLocalFile(page).toString()
        found |= {"console": console, "asked": [one for one in asked if one != own and one[:5] != "data:"]}
        print(json.dumps(found))
        if picture:
            view.resize(int(width), min(found["height"], 16_000))
            QTimer.singleShot(3000, lambda: app.exit(0 if view.grab().save(picture) else 1))
        else:
            app.quit()

    shown.loadFinished.connect(loaded)
    shown.load(QUrl.fromLocalFile(page))
    QTimer.singleShot(SECONDS * 1000, lambda: app.exit(2))
    sys.exit(app.exec())


if __name__ == "__main__":
    main(*sys.argv[1:])
