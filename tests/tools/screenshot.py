"""The picture in the README, two windows side by side: `python -m tests.tools.screenshot [FILE]`.

It needs selenium, Chromium with its driver, and the fonts Inter and Noto Color Emoji. The windows show a real
conversation; only the clock and the port are changed.
"""

from __future__ import annotations

import base64
import pathlib
import sys
import tempfile
import typing

from tests.tools.browser import Tab, chromium
from tests.tools.support import ROOT, Process, free_port

WIDTH, HEIGHT, SCALE = 480, 530, 2

NAMES = "Ann", "Ben"
TALK = [  # (who sends, minute, text)
    (0, 2, "Morning! Is the new build out?"),
    (1, 2, "Going out now, the tests have just passed."),
    (1, 3, "Grüße from the night shift 🌙"),
    (1, 5, "deploy 4.2 → production ✅\n3 hosts, 41 s"),
    (0, 5, "Looks good here. Thank you, sleep well 👋"),
]

# The clock of the page. Without it, all messages would have the same minute. Both windows are in view.
CLOCK = """
    window.minute = 0;
    Object.defineProperty(document, 'hidden', { value: false });
    Date = class extends Date {
        constructor(...given) { if (given.length) super(...given); else super(2025, 4, 12, 9, window.minute); }
    };
"""

FRAME = """<!DOCTYPE html><meta charset="utf-8">
<style>
  body {{ display: flex; gap: 28px; margin: 0; padding: 20px 32px 44px; width: max-content; background: transparent;
          font: 13px Inter, sans-serif; }}
  figure {{ margin: 0; border-radius: 12px; overflow: hidden; background: #fdfcfa;
            box-shadow: 0 0 0 1px #0002, 0 14px 32px #0003; }}
  figcaption {{ display: flex; align-items: center; gap: 8px; padding: 10px 14px;
                background: #e8e4db; color: #57534a; }}
  i {{ width: 12px; height: 12px; border-radius: 50%; background: #cdc6b8; }}
  b {{ flex: 1; margin: 0 52px 0 8px; padding: 4px 12px; border-radius: 8px; background: #f7f5f0;
       font-weight: 450; text-align: center; }}
  img {{ display: block; width: {width}px; height: {height}px; }}
</style>
{windows}"""
WINDOW = """
<figure>
  <figcaption><i></i><i></i><i></i><b>{title}</b></figcaption>
  <img src="data:image/png;base64,{png}">
</figure>"""


def window(browser: typing.Any, url: str) -> Tab:
    """Open a tab of the size of a window, in the light theme."""
    tab = Tab(browser, "about:blank")
    tab.command("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=SCALE, mobile=False)
    tab.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    tab.command("Emulation.setLocaleOverride", locale="en-GB")
    tab.command("Page.enable")
    tab.command("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)
    browser.get(url)
    tab.run("document.body.style.fontFamily = 'Inter, sans-serif'")
    tab.wait_for_state("connected")
    return tab


def hold(talk: typing.Sequence[tuple[int, int, str]], windows: typing.Sequence[Tab]) -> None:
    """Send each message from its window, after both windows show the one before it."""
    for i, (who, minute, text) in enumerate(talk):
        for each in windows:
            each.run("window.minute = arguments[0]", minute)
        # The driver has no keys for emoji.
        windows[who].run("document.getElementById('draft').value = arguments[0]", text)
        windows[who].send("")
        for each in windows:
            each.wait_for_messages(i + 1)


def picture(tab: Tab, **clip: typing.Any) -> bytes:
    """Return a picture of a tab, as PNG."""
    return base64.b64decode(tab.command("Page.captureScreenshot", format="png", **clip)["data"])


def compose(browser: typing.Any, titles: typing.Sequence[str], pictures: typing.Sequence[bytes]) -> bytes:
    """Draw the windows side by side, on a transparent background, since the README may be light or dark."""
    windows = [WINDOW.format(title=title, png=base64.b64encode(png).decode()) for title, png in zip(titles, pictures)]
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder, "frame.html")
        page.write_text(FRAME.format(width=WIDTH, height=HEIGHT, windows="".join(windows)), "utf-8")
        tab = Tab(browser, page.as_uri())
        width, height = tab.run("return [document.body.offsetWidth, document.body.offsetHeight]")
        tab.command("Emulation.setDefaultBackgroundColorOverride", color={"r": 0, "g": 0, "b": 0, "a": 0})
        return picture(
            tab, captureBeyondViewport=True, clip={"x": 0, "y": 0, "width": width, "height": height, "scale": SCALE}
        )


def take(path: pathlib.Path) -> None:
    """Write the picture to a file."""
    port = free_port()
    rules = f"--host-resolver-rules=MAP localhost:4545 127.0.0.1:{port}"
    with chromium(rules) as browser, Process("--port", str(port)):
        windows = [window(browser, url) for url in ("http://localhost:4545/", (ROOT / "pywebsock.html").as_uri())]
        for tab, name in zip(windows, NAMES):
            tab.run("name = arguments[0]", name)
        hold(TALK, windows)
        windows[1].run("document.activeElement.blur()")  # the first window has the focus
        pictures = [picture(each) for each in windows]
        path.write_bytes(compose(browser, ("localhost:4545", "pywebsock.html"), pictures))


if __name__ == "__main__":
    take(pathlib.Path(sys.argv[1]) if sys.argv[1:] else ROOT / "tests" / "pywebsock.png")
