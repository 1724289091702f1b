"""Chromium, for the tests that need a browser and for the picture in the README."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import typing

from tests.tools.support import DEADLINE, eventually, package, require

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",  # the tests talk to nobody else
    "--disable-component-update",
)


@contextlib.contextmanager
def chromium(*arguments: str) -> typing.Iterator[typing.Any]:
    """A selenium driver of a headless Chromium with a profile of its own, which is gone afterwards."""
    webdriver = package("selenium.webdriver")
    binary = shutil.which("chromium")
    driver = shutil.which("chromedriver")  # named, or selenium looks for one on the network
    require(binary, "chromium")
    require(driver, "chromedriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", *arguments):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        try:
            browser.set_page_load_timeout(DEADLINE)
            browser.set_script_timeout(DEADLINE)
            yield browser
        finally:
            browser.quit()


class Tab:
    """A tab of such a browser, with pywebsock.html in it."""

    def __init__(self, browser: typing.Any, url: str) -> None:
        self._browser = browser
        self.url = url
        browser.switch_to.new_window("tab")
        self._handle = browser.current_window_handle
        browser.get(url)

    def run(self, script: str, *arguments: typing.Any) -> typing.Any:
        """Run JavaScript, and return what it returns."""
        self._browser.switch_to.window(self._handle)
        return self._browser.execute_script(script, *arguments)

    def command(self, name: str, **arguments: typing.Any) -> typing.Any:
        """A command of the DevTools protocol."""
        self._browser.switch_to.window(self._handle)
        return self._browser.execute_cdp_cmd(name, arguments)

    def find(self, selector: str) -> typing.Any:
        """An element."""
        self._browser.switch_to.window(self._handle)
        return self._browser.find_element("css selector", selector)

    def shows(self, selector: str) -> bool:
        """Whether an element is visible."""
        return bool(self.find(selector).is_displayed())

    def click(self, selector: str) -> None:
        """Click an element."""
        self.find(selector).click()

    def send(self, text: str) -> None:
        """Type a message and send it."""
        shift, enter = "\ue008", "\ue007"  # WebDriver 17.4.2; held down, and pressed
        draft = self.find("#draft")
        draft.send_keys(text.replace("\n", shift + enter + shift))
        draft.send_keys(enter)

    def state(self) -> tuple[str, str]:
        """Of the connection, as the page is drawn and as it is read."""
        drawn, read = self.run(
            "return [document.documentElement.dataset.state, document.getElementById('status').textContent]"
        )
        return drawn, read

    def wait_for_state(self, state: str, deadline: float = DEADLINE) -> None:
        """Wait until the connection is in a state."""
        eventually(lambda: self.state() == (state, state), f"{state} in {self.url}", deadline)

    def wait_for_messages(self, count: int) -> None:
        """Wait until there are so many messages in the log."""
        eventually(lambda: len(self.messages()) >= count, f"{count} messages in {self.url}")

    def messages(self, kind: str = "") -> list[str]:
        """The texts in the log; with the kind `.mine`, only of the messages that were sent here."""
        return self._texts(f"#log li.message{kind} .text")

    def outbox(self) -> list[str]:
        """The texts that have not come back yet."""
        return self._texts("#outbox .text")

    def _texts(self, selector: str) -> list[str]:
        texts = self.run("return Array.from(document.querySelectorAll(arguments[0]), e => e.textContent)", selector)
        return list(texts)

    def complaints(self, expected: str = "") -> list[str]:
        """What stands in the browser's log, but for what is expected."""
        self._browser.switch_to.window(self._handle)
        lines = [entry["message"] for entry in self._browser.get_log("browser")]
        return [line for line in lines if not expected or expected not in line]

    def close(self) -> None:
        """Close the tab; the browser's first one stays."""
        self._browser.switch_to.window(self._handle)
        self._browser.close()
        self._browser.switch_to.window(self._browser.window_handles[0])
