#!/usr/bin/env python3
"""Checks the web page in headless Chromium (needs `pip install playwright` and a Chromium; see --chromium).

    python3 tests/web_page.py [--program target/release/mxserve] [--model tests/models/rustdoc-6m] [--pictures FOLDER]

Starts the server with an API key and a chat template, and does what a user does: gives the key, types, reads a stream,
stops one, looks at a token's alternatives with the mouse and with the keyboard, meets an error, and uses the page at the
width of a phone. The page must ask no other host, write no error to the console, and break no rule of its policy.
"""

import argparse
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from playwright.sync_api import Page, expect, sync_playwright

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "open-sesame"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Server:
    """`mxserve` on a free port, for as long as the `with` block lasts."""

    def __init__(self, program, model, *flags):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        address = ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(64 << 20)]
        self.process = subprocess.Popen(
            [program, model, *address, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self):
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        self.process.kill()
        sys.exit("the server does not start")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=20)


class Watcher:
    """Collects what must not happen on a page."""

    def __init__(self, page: Page, url: str):
        self.troubles = []
        page.on("pageerror", lambda error: self.troubles.append(f"exception: {error}"))
        page.on("console", self.console)
        page.on("request", lambda request: request.url.startswith(url) or self.troubles.append(f"asked {request.url}"))

    def console(self, message):
        # A request that is refused on purpose is noted there by the browser itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.troubles.append(f"console: {message.text}")


def answers(page: Page):
    return page.locator(".turn.answer")


def ask(page: Page, text: str):
    message, prompt = (page.get_by_role("textbox", name=name, exact=True) for name in ["Message", "Prompt"])
    message.or_(prompt).fill(text)
    page.locator("#send").click()


def finished(page: Page, index: int):
    answer = answers(page).nth(index)
    expect(answer).to_have_attribute("aria-busy", "false", timeout=30_000)
    return answer


def give_key(page: Page):
    """A first request without a key opens the dialog; a wrong key is told; the right one sends the request again."""
    ask(page, "Hello")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key", exact=True).fill("wrong")
    dialog.get_by_role("button", name="Use").click()
    expect(dialog.get_by_role("alert")).to_contain_text("does not know")
    dialog.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(answers(page)).to_have_count(1)
    # Between the refusal and the request's second start the answer is not busy either.
    expect(answers(page).nth(0).locator(".meta")).to_contain_text("tokens/s", timeout=30_000)
    expect(finished(page, 0)).not_to_contain_text("401")


def chat_streams(page: Page):
    page.get_by_label("Most tokens").fill("40")
    box = page.get_by_role("textbox", name="Message", exact=True)
    box.fill("Write a function")
    # Forty tokens come faster than a test looks.
    page.evaluate(
        """() => new MutationObserver(() => {
            const answer = document.querySelectorAll(".turn.answer")[1];
            window.sawBusy ||= answer?.getAttribute("aria-busy") === "true";
        }).observe(document.getElementById("turns"), { attributes: true, childList: true, subtree: true })"""
    )
    box.press("Enter")
    answer = answers(page).nth(1)
    expect(answer.locator(".meta")).to_contain_text("tokens/s", timeout=30_000)
    finished(page, 1)
    assert page.evaluate("window.sawBusy"), "an answer says that it is being made"
    expect(page.locator(".turn.user")).to_have_count(2)
    expect(page.locator("#announcer")).to_contain_text("complete")


def tokens_show_alternatives(page: Page):
    tokens = answers(page).nth(1).locator(".text .token")
    assert tokens.count() > 5, "an answer is made of coloured tokens"
    # A line's end has no place for the mouse.
    tokens.filter(has_text=re.compile(r"\S")).nth(2).hover()
    popover = page.get_by_role("tooltip")
    expect(popover).to_be_visible()
    assert popover.locator("tr").count() >= 5
    expect(popover.locator("tr.chosen")).to_have_count(1)
    expect(popover).to_contain_text("%")
    page.mouse.move(2, 2)
    expect(popover).to_be_hidden()
    # One token can be reached with Tab, the arrows lead on.
    tokens.first.focus()
    expect(popover).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()


def completion_stops(page: Page):
    page.get_by_role("tab", name="Completion").click()
    page.get_by_label("Most tokens").fill("900")
    page.get_by_label("Seed").fill("1")
    # The model is faster than a test: the page itself clicks when there is something to stop.
    page.evaluate(
        """() => new MutationObserver((_, observer) => {
            if (document.querySelectorAll(".answer.completion .token").length < 4) return;
            observer.disconnect();
            document.getElementById("stop").click();
        }).observe(document.getElementById("turns"), { childList: true, subtree: true })"""
    )
    ask(page, "/// Returns the number of")
    answer = finished(page, 0)
    expect(answer.locator(".meta")).to_contain_text("stopped")
    count = answer.locator(".text .token").count()
    assert 3 < count < 900, count
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    expect(page.locator("#running")).to_have_text("0", timeout=10_000)


def errors_are_shown(page: Page):
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("Top k").fill("7")
    # The page's own checks do not know the context's length.
    ask(page, "a " * 60_000)
    answer = finished(page, 1)
    expect(answer.get_by_role("alert")).to_contain_text("BadRequestError (400)")
    expect(answer.get_by_role("alert")).to_contain_text("prompt")
    # What the form can tell by itself is not sent.
    page.get_by_label("Temperature").fill("-1")
    ask(page, "b")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Defaults").click()
    expect(page.get_by_label("Temperature")).to_have_value("")


def figures_are_live(page: Page):
    for name in ["tokens-rate", "first-p50", "next-p95", "parameters-held", "total-held"]:
        expect(page.locator(f"#{name}")).not_to_have_text("–", timeout=10_000)
    expect(page.locator("#formats tr")).not_to_have_count(0)
    expect(page.locator("#parameters-legend div")).not_to_have_count(0)
    expect(page.locator("#state-text")).to_have_text("Ready", timeout=10_000)


def everything_is_named(page: Page):
    """What can be used has a name for a screen reader; what is typed into has a label."""
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a, [role=img]")]
            .filter((e) => !e.hidden)
            .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert not unnamed, unnamed


def no_sideways_scrolling(page: Page):
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, f"the page is {overflow} pixels too wide"


def desktop(page: Page, pictures):
    def picture(name):
        if pictures:
            page.screenshot(path=pictures / f"{name}.png")

    page.locator("#parameters summary").click()
    picture("desktop-empty")
    give_key(page)
    chat_streams(page)
    tokens_show_alternatives(page)
    page.locator("#parameters summary").click()
    answers(page).nth(1).locator(".text .token").nth(4).hover()
    picture("desktop-chat")
    page.locator("#parameters summary").click()
    completion_stops(page)
    errors_are_shown(page)
    picture("desktop-error")
    figures_are_live(page)
    everything_is_named(page)
    no_sideways_scrolling(page)


def phone(page: Page, pictures):
    def picture(name):
        if pictures:
            page.screenshot(path=pictures / f"{name}.png")

    picture("phone-empty")
    give_key(page)
    ask(page, "Write a function")
    finished(page, 1)
    no_sideways_scrolling(page)
    answers(page).nth(1).locator(".text .token").nth(3).tap()
    expect(page.get_by_role("tooltip")).to_be_visible()
    picture("phone-chat")
    page.get_by_role("tab", name="Server").click()
    expect(page.locator("#prompt")).to_be_hidden()
    figures_are_live(page)
    no_sideways_scrolling(page)
    picture("phone-server")
    page.get_by_role("tab", name="Chat").click()
    expect(answers(page)).to_have_count(2)
    page.locator("#parameters summary").click()
    no_sideways_scrolling(page)
    picture("phone-parameters")


def without_chat_template(page: Page):
    expect(page.get_by_role("tab", name="Chat")).to_be_disabled()
    expect(page.get_by_role("tab", name="Completion")).to_have_attribute("aria-selected", "true")
    page.get_by_role("button", name="Once upon a time").click()
    finished(page, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", default=str(ROOT / "target/release/mxserve"))
    parser.add_argument("--model", default=str(ROOT / "tests/models/rustdoc-6m"))
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="program [default: chromium on PATH]")
    parser.add_argument("--pictures", type=pathlib.Path, help="folder for screenshots")
    arguments = parser.parse_args()
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)

    wide = {"viewport": {"width": 1280, "height": 860}}
    narrow = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
    dark = {**wide, "color_scheme": "dark", "reduced_motion": "reduce"}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        template = pathlib.Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        flags = ["--api-key", KEY, "--chat-template", str(template)]
        # Without a sandbox of its own: tests run in containers, often as root.
        options = {"executable_path": arguments.chromium, "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)

        def visit(server, settings, check, *more):
            context = browser.new_context(**settings)
            page = context.new_page()
            watcher = Watcher(page, server.url)
            page.goto(server.url)
            check(page, *more)
            context.close()
            assert not watcher.troubles, watcher.troubles
            print(f"{check.__name__}: fine")

        with Server(arguments.program, arguments.model, *flags) as server:
            visit(server, wide, desktop, arguments.pictures)
            visit(server, narrow, phone, arguments.pictures)
            dark_pictures = arguments.pictures and arguments.pictures / "dark"
            visit(server, dark, desktop, dark_pictures)
        with Server(arguments.program, arguments.model) as server:
            visit(server, wide, without_chat_template)
        browser.close()


if __name__ == "__main__":
    main()
