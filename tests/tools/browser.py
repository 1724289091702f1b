"""Browsers for the tests of the page: Chromium, Firefox and WebKitGTK.

selenium drives Chromium and WebKitGTK. Debian has no geckodriver, which translates selenium's commands for Firefox's
Marionette. Marionette takes the same commands as JSON over TCP: see `Firefox`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import typing
import unittest

from tests.tools.support import ROOT, Process, eventually, package, require, scratch

START = 60.0  # seconds that a browser may take to start on a busy machine
PATIENCE = 40.0  # seconds that a test of the page waits for anything; attempts to connect are up to 15 seconds apart
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver 11: the key of a reference to an element
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which does not work as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",  # no traffic besides the tests
    "--disable-component-update",
)
PREFERENCES = {
    "marionette.port": 0,  # any free one; Firefox writes it to a file
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "app.update.disabledForTesting": True,
    "extensions.update.enabled": False,
    "toolkit.telemetry.server": "",
}

# An expression for a File in the page; the arguments are its bytes in base64 and its name.
FILE = "new File([Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0))], arguments[1])"

# Scripts of Marionette see a page's functions, but not its variables. The page's Content-Security-Policy forbids
# further script elements. The debugger can run any code in the page.
INJECT = """
    const { addDebuggerToGlobal } = ChromeUtils.importESModule('resource://gre/modules/jsdebugger.sys.mjs');
    addDebuggerToGlobal(globalThis);
    const made = new Debugger();
    const page = made.addDebuggee(window.wrappedJSObject);
    const { return: result } = page.executeInGlobal(`try {
        JSON.stringify([(function () { ${arguments[0]}\\n}).apply(null, ${arguments[1]}) ?? null, null]);
    } catch (error) { JSON.stringify([null, String(error)]); }`);
    made.removeAllDebuggees();
    return result;
"""


def seal(page: str) -> str:
    """Return a page with the hashes of its style and its script in its Content-Security-Policy (CSP 3, 6.7.3.3)."""
    for tag in "style", "script":
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content, tag
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        page = re.sub(rf"({tag}-src\s+'sha256-)[^']*", rf"\g<1>{digest}", page)
    return page


@contextlib.contextmanager
def chromium(*arguments: str, binary: str | None = None) -> typing.Iterator[typing.Any]:
    """Yield a selenium driver of a headless Chromium with a temporary profile."""
    webdriver = package("selenium.webdriver")
    binary = binary or shutil.which("chromium")
    driver = shutil.which("chromedriver")  # without a path, selenium looks for one on the network
    require(binary, "chromium")
    require(driver, "chromedriver")
    with scratch() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", *arguments):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        with _driven(
            webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        ) as browser:
            yield browser


@contextlib.contextmanager
def webkit() -> typing.Iterator[typing.Any]:
    """Yield a selenium driver of WebKitGTK's MiniBrowser, on a virtual screen."""
    webdriver = package("selenium.webdriver")
    service = package("selenium.webdriver.webkitgtk.service")
    driver, screen = shutil.which("WebKitWebDriver"), shutil.which("Xvfb")
    binary = next(pathlib.Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), None)
    require(driver and binary, "WebKitWebDriver with MiniBrowser")
    require(screen, "Xvfb")
    with scratch() as home:
        command = [str(screen), "-displayfd", "1", "-screen", "0", "1280x1024x24", "-nolisten", "tcp"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as xvfb:
            try:
                assert xvfb.stdout
                display = xvfb.stdout.readline().decode().strip()
                environment = {**os.environ, "DISPLAY": f":{display}", "HOME": home, "GDK_BACKEND": "x11"}
                options = webdriver.WebKitGTKOptions()
                options.binary_location = str(binary)
                options.add_argument("--automation")
                running = service.Service(executable_path=driver, env=environment)
                with _driven(webdriver.WebKitGTK(options=options, service=running)) as browser:
                    yield browser
            finally:
                xvfb.terminate()


@contextlib.contextmanager
def _driven(browser: typing.Any) -> typing.Iterator[typing.Any]:
    try:
        browser.set_page_load_timeout(START)
        browser.set_script_timeout(START)
        yield browser
    finally:
        browser.quit()


@contextlib.contextmanager
def firefox() -> typing.Iterator[typing.Any]:
    """Yield a headless Firefox, with those methods of a selenium driver that the tests use."""
    package("selenium.webdriver")  # not used here, but the other two need it
    binary = shutil.which("firefox-esr") or shutil.which("firefox")
    require(binary, "firefox")
    with scratch() as profile:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items()]
        pathlib.Path(profile, "user.js").write_text("".join(lines))
        command = [str(binary), "--headless", "--marionette", "--no-remote", "--profile", profile]
        environment = {**os.environ, "HOME": profile}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            port = pathlib.Path(profile, "MarionetteActivePort")
            eventually(lambda: port.is_file() and port.read_text().strip(), "the port of Firefox", START)
            browser = Firefox(int(port.read_text()))
            try:
                yield browser
            finally:
                browser.quit()
            process.wait(START)
        finally:
            with contextlib.suppress(OSError):  # all of its processes, if it has not ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Firefox:
    """A client of Marionette: it sends `[0, id, command, parameters]` and receives `[1, id, error, result]`.

    The length in digits and a colon are before each.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), START)
        self._stream = self._socket.makefile("rb")
        self._ids = itertools.count(1)
        self.switch_to = self  # as in selenium
        self._read()  # the greeting
        self.call("NewSession", {"pageLoadStrategy": "normal", "unhandledPromptBehavior": "ignore"})

    def _read(self) -> typing.Any:
        length = b""
        while not length.endswith(b":"):
            byte = self._stream.read(1)
            if not byte:
                raise EOFError("Firefox has ended")
            length += byte
        return json.loads(self._stream.read(int(length[:-1])))

    def call(self, command: str, parameters: dict[str, typing.Any] | None = None) -> typing.Any:
        """Run a command of WebDriver and return its result. Raises RuntimeError."""
        message = json.dumps([0, next(self._ids), f"WebDriver:{command}", parameters or {}]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._read()
        if error:
            raise RuntimeError(f"{error['error']}: {error['message']}")
        return result["value"] if isinstance(result, dict) and set(result) == {"value"} else result

    @property
    def current_window_handle(self) -> str:
        """The current tab."""
        return str(self.call("GetWindowHandle"))

    @property
    def window_handles(self) -> list[str]:
        """All tabs."""
        return list(self.call("GetWindowHandles"))

    def new_window(self, kind: str) -> None:
        """Open a tab and switch to it."""
        self.window(self.call("NewWindow", {"type": kind})["handle"])

    def window(self, handle: str) -> None:
        """Switch to a tab."""
        self.call("SwitchToWindow", {"handle": handle, "focus": True})

    def get(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self.call("Navigate", {"url": url})

    def refresh(self) -> None:
        """Reload the page."""
        self.call("Refresh")

    def execute_script(self, script: str, *arguments: typing.Any) -> typing.Any:
        """Run JavaScript in the page, and return its result."""
        given = {"script": INJECT, "args": [script, json.dumps(arguments)], "sandbox": "system"}
        value, error = json.loads(self.call("ExecuteScript", given))
        if error:
            raise RuntimeError(error)
        return value

    def find_element(self, _: str, selector: str) -> FirefoxElement:
        """Return an element by its CSS selector."""
        return FirefoxElement(self, self.call("FindElement", {"using": "css selector", "value": selector})[ELEMENT])

    def get_screenshot_as_png(self) -> bytes:
        """Return a picture of the visible part of the page."""
        return base64.b64decode(self.call("TakeScreenshot", {"full": False}))

    def set_window_size(self, width: int, height: int) -> None:
        """Set the size of the whole window."""
        self.call("SetWindowRect", {"width": width, "height": height})

    def perform(self, actions: list[dict[str, typing.Any]]) -> None:
        """Perform actions of pointer, wheel and keys (WebDriver 17)."""
        self.call("PerformActions", {"actions": actions})

    def close(self) -> None:
        """Close the tab."""
        self.call("CloseWindow")

    def quit(self) -> None:
        """End the browser."""
        message = json.dumps([0, next(self._ids), "Marionette:Quit", {"flags": ["eForceQuit"]}]).encode()
        with contextlib.suppress(OSError, EOFError):
            self._socket.sendall(b"%d:%s" % (len(message), message))
            self._read()
        self._stream.close()
        self._socket.close()


class FirefoxElement:
    """An element, with those methods of selenium that the tests use."""

    def __init__(self, browser: Firefox, reference: str) -> None:
        self._browser = browser
        self.id = reference

    def send_keys(self, text: str) -> None:
        """Type text."""
        self._browser.call("ElementSendKeys", {"id": self.id, "text": text})

    def click(self) -> None:
        """Click the element."""
        self._browser.call("ElementClick", {"id": self.id})

    def is_displayed(self) -> bool:
        """Return whether the element is visible."""
        return bool(self._browser.call("IsElementDisplayed", {"id": self.id}))


ENGINES: dict[str, typing.Callable[[], contextlib.AbstractContextManager[typing.Any]]] = {
    "Chromium": chromium,
    "Firefox": firefox,
    "WebKit": webkit,
}


class Tab:
    """A tab of a browser, with pywebsock.html in it."""

    def __init__(self, browser: typing.Any, url: str) -> None:
        self.browser = browser
        self.url = url
        # MiniBrowser's tabs do not come to the front.
        browser.switch_to.new_window("window" if getattr(browser, "name", "") == "MiniBrowser" else "tab")
        self._handle = browser.current_window_handle
        browser.get(url)

    def front(self) -> typing.Any:
        """Switch to this tab, and return the browser."""
        self.browser.switch_to.window(self._handle)
        return self.browser

    def reload(self) -> None:
        """Load the page again."""
        self.front().refresh()

    def run(self, script: str, *arguments: typing.Any) -> typing.Any:
        """Run JavaScript, and return its result."""
        return self.front().execute_script(script, *arguments)

    def command(self, name: str, **arguments: typing.Any) -> typing.Any:
        """Run a command of the DevTools protocol (only in Chromium)."""
        return self.front().execute_cdp_cmd(name, arguments)

    def perform(self, actions: list[dict[str, typing.Any]]) -> None:
        """Perform actions of pointer, wheel and keys (WebDriver 17)."""
        browser = self.front()
        if isinstance(browser, Firefox):
            browser.perform(actions)
        else:
            browser.execute("actions", {"actions": actions})

    def find(self, selector: str) -> typing.Any:
        """Return an element by its CSS selector."""
        return self.front().find_element("css selector", selector)

    def shows(self, selector: str) -> bool:
        """Return whether an element is visible."""
        return bool(self.find(selector).is_displayed())

    def click(self, selector: str) -> None:
        """Click an element."""
        self.find(selector).click()

    def send(self, text: str) -> None:
        """Type a message and send it."""
        shift, enter = "\ue008", "\ue007"  # WebDriver 17.4.2; held down, then pressed
        draft = self.find("#draft")
        draft.send_keys(text.replace("\n", shift + enter + shift))
        draft.send_keys(enter)

    def state(self) -> tuple[str, str]:
        """The state of the connection, as it is shown and as a screen reader reads it."""
        drawn, read = self.run(
            "return [document.documentElement.dataset.state, document.getElementById('status').textContent]"
        )
        return drawn, read

    def wait_for_state(self, state: str) -> None:
        """Wait until the connection is in a state; if it is connected, until messages are sent at once, too."""
        eventually(lambda: self.state() == (state, state), f"{state} in {self.url}", PATIENCE)
        if state == "connected":
            known = "return connection.readOnly !== null"
            eventually(lambda: self.run(known), f"it is known whether {self.url} only sends", PATIENCE)

    def wait_for_messages(self, count: int) -> None:
        """Wait until there is this number of messages in the log."""
        eventually(lambda: len(self.messages()) >= count, f"{count} messages in {self.url}", PATIENCE)

    def messages(self, kind: str = "") -> list[str]:
        """Return the texts in the log; with the kind `.mine`, only of the messages that this tab has sent."""
        return self._texts(f"#log li.message{kind} .text")

    def notes(self) -> list[str]:
        """Return the notes of the page."""
        return self._texts("#log li.system")

    def outbox(self) -> list[str]:
        """Return the texts that have not come back."""
        return self._texts("#outbox .text")

    def outbox_states(self) -> list[str]:
        """Return the states of these texts."""
        return self._texts("#outbox .foot span")

    def _texts(self, selector: str) -> list[str]:
        texts = self.run("return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)", selector)
        return list(texts)

    def complaints(self, expected: typing.Sequence[str] = ()) -> list[str]:
        """Return the lines of Chromium's log, without the expected ones."""
        lines = [entry["message"] for entry in self.front().get_log("browser")]
        return [line for line in lines if not any(each in line for each in expected)]

    def close(self) -> None:
        """Close the tab, unless it is the first one of the browser."""
        self.front().close()
        self.browser.switch_to.window(self.browser.window_handles[0])


class Browsers:
    """One browser of each engine, started when it is first used; `close` ends them."""

    def __init__(self) -> None:
        self._open: dict[str, typing.Any] = {}
        self._stack = contextlib.ExitStack()

    def __getitem__(self, name: str) -> typing.Any:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(ENGINES[name]())
        return self._open[name]

    def close(self) -> None:
        """End all browsers that were started."""
        self._open.clear()
        self._stack.close()


BROWSERS = Browsers()
EXPECTED = (  # in Chromium's log, if a server is away or refuses
    "net::ERR_CONNECTION_REFUSED",
    "net::ERR_CONNECTION_RESET",
    "net::ERR_EMPTY_RESPONSE",
    "net::ERR_NAME_NOT_RESOLVED",
    "404 (Not Found)",
    "WebSocket connection to",
    "403 (Forbidden)",
    "net::ERR_FAILED",
    "blocked by CORS policy",
    "Close received after close",
    "Blocked attempt to show a 'beforeunload'",
)


class PageTestCase(unittest.TestCase):
    """Tests of the page in one engine; `in_each_engine` makes a class for each engine."""

    engine: typing.ClassVar[str] = "Chromium"

    @classmethod
    def setUpClass(cls) -> None:
        BROWSERS[cls.engine]  # without it, all tests are skipped

    def serve(self, *arguments: str, port: int = 0) -> Process:
        """Start a server in its own process, which ends with the test."""
        server = Process(*(("--port", str(port)) if port else ()), *arguments)
        self.addCleanup(server.stop)
        return server

    def open(self, url: str, engine: str = "", state: str = "connected") -> Tab:
        """Open a new tab, which is closed after the test; by then, its log must have no errors."""
        tab = Tab(BROWSERS[engine or self.engine], url)
        self.addCleanup(tab.close)
        if (engine or self.engine) == "Chromium":
            self.addCleanup(lambda: self.assertEqual(tab.complaints(EXPECTED), []))
        if state:
            tab.wait_for_state(state)
        return tab

    def from_disk(self, server: typing.Any, page: pathlib.Path = ROOT / "pywebsock.html") -> str:
        """Return the address of the page on disk, for a server."""
        return f"{page.as_uri()}?server=ws://localhost:{server.port}"

    def hasty(self, **constants: int) -> pathlib.Path:
        """Write a copy of the page with shorter times, so that a test waits less than a user; return its path."""
        text = (ROOT / "pywebsock.html").read_text("utf-8")
        for name, value in constants.items():
            text, found = re.subn(rf"(const {name} = )[0-9_e]+", rf"\g<1>{value}", text)
            assert found == 1, name
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = pathlib.Path(folder.name, "page.html")
        path.write_text(seal(text), "utf-8")
        return path

    def wait(self, condition: typing.Callable[[], object], what: str) -> None:
        """Wait until a condition holds."""
        eventually(condition, f"{what} ({self.engine})", PATIENCE)


def only_in(*engines: str) -> typing.Callable[[typing.Any], typing.Any]:
    """Skip the test in the other engines, which lack the feature."""

    def mark(test: typing.Any) -> typing.Any:
        test.engines = engines
        return test

    return mark


def in_each_engine(*cases: type[PageTestCase]) -> None:
    """Replace a class of tests in its module by one class for each engine."""
    for module, case, engine in [(sys.modules[case.__module__], case, each) for case in cases for each in ENGINES]:
        name = f"{case.__name__}In{engine}"
        elsewhere = {each: None for each in dir(case) if engine not in getattr(getattr(case, each), "engines", ENGINES)}
        setattr(module, name, type(name, (case,), {"engine": engine, "__module__": case.__module__, **elsewhere}))
    for case in cases:
        delattr(sys.modules[case.__module__], case.__name__)


if __name__ == "__main__":
    PAGE = ROOT / "pywebsock.html"
    PAGE.write_text(seal(PAGE.read_text("utf-8")), "utf-8")
