"""The page at ``/``, in a real browser, over a real deployment."""

import re
import shutil

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from test_deploy import Box

KEY = "secret-2"
expect.set_options(timeout=30_000)  # a busy machine
HOSTILE = "<img src=x onerror='window.hurt=1'><script>window.hurt=1</script>"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    box = Box(tmp_path_factory.mktemp("page"))
    done = box.run("init", "--preset", "tiny", "--format", "fp32", "--out", box.folder / "tiny")
    assert done.returncode == 0, done.stderr
    settings = (f"serve.api_keys=[{KEY}]", "serve.n_draft_tokens=1", "name=page")
    options = [word for s in settings for word in ("--set", s)]
    done = box.run("deploy", "--topology", box.topology, *options, "--detach")
    assert done.returncode == 0, done.stderr
    yield box
    assert box.run("down", "page").returncode == 0


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome in PATH: the page is tried in a real browser")
    with sync_playwright() as playwright:
        # A sandbox cannot be made by root; the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(served, browser):
    """The page, once it knows the deployment; whatever it asks of another host fails the test."""
    with browser.new_context() as context:
        page = context.new_page()
        asked, broken = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: broken.append(e))
        page.goto(served.url)
        expect(page.locator("#ranks tr")).to_have_count(1)
        yield page
        assert [url for url in asked if not url.startswith(f"{served.url}/")] == []
        assert broken == []


def say(page, text, **settings):
    """Say it by keyboard; settings by the ids of their fields. Return the box of its answer."""
    for field, value in settings.items():
        control = page.locator(f"#{field}")
        is_list = control.evaluate("e => e.tagName") == "SELECT"
        control.select_option(value) if is_list else control.fill(value)
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    return page.locator("article.assistant").last


def stream(*events):
    """A body of server-sent events."""
    return "".join(f"data: {e}\n\n" for e in events)


def answers(page, body):
    """The server's next answers are this body."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))


def test_it_runs_nothing_but_itself(served):
    answer = httpx.get(served.url)
    assert answer.headers["content-type"].startswith("text/html")
    rules = dict(r.split(" ", 1) for r in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert all(rules[r].startswith("'sha256-") for r in ("script-src", "style-src"))
    assert re.findall(r"innerHTML|outerHTML|https?:|localStorage|cookie", answer.text) == []


def endless(route):
    """A random model may end by itself before anything is seen of it."""
    route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})


def test_an_answer_streams_with_its_figures_and_the_rank_moves(page):
    page.route("**/v1/chat/completions", endless)
    answer = say(page, "hi", key=KEY, most="600", effort="high")
    expect(answer.locator(".reasoning")).not_to_be_empty(timeout=20_000)
    figures = answer.locator(".figures")
    expect(figures).to_contain_text(re.compile(r"about [\d.]+ tokens/s"))
    expect(page.locator("#running")).to_have_text("1")
    expect(figures).to_have_text(
        re.compile(r"^first token after \d+ ms · [\d.]+ tokens/s · 600 tokens · cut off")
    )
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#drafts")).to_have_text(re.compile(r"\d+ % of \d+"))
    expect(page.locator("#ranks td").nth(2)).not_to_have_text("0")
    expect(page.locator("#state")).to_have_text("ready, canary unreferenced")
    expect(page.locator("#model")).to_have_text("v4-tiny")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_can_be_stopped_and_its_slot_is_free(page, how):
    page.route("**/v1/chat/completions", endless)
    answer = say(page, "hi", key=KEY, most="900")
    expect(answer.locator(".text")).not_to_be_empty(timeout=20_000)
    expect(page.locator("#running")).to_have_text("1")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("#running")).to_have_text("0")


def test_what_the_api_refuses_is_said_as_it_says_it(page):
    answer = say(page, "hi")
    error = answer.get_by_role("alert")
    expect(error).to_contain_text("401 authentication_error: a valid API key is needed")
    expect(page.get_by_label("Message")).to_have_value("hi")  # to be sent again
    long = say(page, "x" * 4000, key=KEY).get_by_role("alert")
    expect(long).to_contain_text("400 invalid_request_error")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)


def test_an_error_late_in_a_stream_and_a_stream_that_breaks_off(page):
    text = '{"choices": [{"delta": {"content": "half"}, "finish_reason": null}]}'
    late = '{"error": {"message": "the model stopped: rank 0", "type": "server_error"}}'
    for body, says in (
        (stream(text, late), "server_error: the model stopped: rank 0"),
        (stream(text), "the stream broke off before its end"),
    ):
        answers(page, body)
        answer = say(page, "hi")
        expect(answer.get_by_role("alert")).to_have_text(says)
        expect(answer.locator(".text")).to_have_text("half")


def test_what_a_model_says_is_text(page):
    part = '{{"choices": [{{"delta": {{"{}": "{}"}}, "finish_reason": null}}]}}'
    body = stream(part.format("reasoning_content", HOSTILE), part.format("content", HOSTILE))
    answers(page, f"{body}data: [DONE]\n\n")
    answer = say(page, HOSTILE)
    for box in (answer.locator(".reasoning"), answer.locator(".text"), page.locator(".user")):
        expect(box).to_have_text(HOSTILE)
    assert page.evaluate("window.hurt") is None
    assert page.locator("main img, main script").count() == 0


def test_a_turn_is_said_again_with_the_next_one(page):
    sent = []

    def note(route):
        sent.append(route.request.post_data_json["messages"])
        delta = f'{{"content": "answer {len(sent)}"}}'
        body = stream(f'{{"choices": [{{"delta": {delta}, "finish_reason": "stop"}}]}}', "[DONE]")
        route.fulfill(body=body)

    page.route("**/v1/chat/completions", note)
    for n in (1, 2):
        expect(say(page, f"question {n}").locator(".text")).to_have_text(f"answer {n}")
    said = [(m["role"], m["content"]) for m in sent[1]]
    assert said == [("user", "question 1"), ("assistant", "answer 1"), ("user", "question 2")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_both_schemes(page, scheme):
    """WCAG's contrast of every text with what is behind it."""
    page.emulate_media(color_scheme=scheme)
    say(page, "hi")
    expect(page.get_by_role("alert")).to_be_visible()
    seen = page.evaluate("""() => [...document.querySelectorAll("body *")].filter(e =>
        e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    ).map(e => {
        let behind = e;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [e.tagName + "." + e.className, getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
    })""")  # noqa: E501
    assert len(seen) > 30
    for what, color, behind in seen:
        light, dark = sorted((luminance(color), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (what, color, behind)


def luminance(color):
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_control_has_a_name_and_is_reached_by_tab(page):
    names = []
    page.get_by_label("Message").focus()
    for _ in range(7):
        names.append(page.evaluate("""() => {
            const e = document.activeElement;
            return e.ariaLabel ?? e.labels?.[0]?.firstChild.data.trim() ?? "";
        }""") or page.evaluate("document.activeElement.textContent"))  # fmt: skip
        page.keyboard.press("Tab")
    assert names == [
        "Message", "Send", "Thinking", "Temperature", "Most tokens", "API key", "New chat",
    ]  # fmt: skip
    assert page.locator("#log").get_attribute("aria-label") == "Conversation"


def test_it_says_when_nobody_answers(page):
    page.route("**/ready", lambda route: route.abort())
    expect(page.locator("#state")).to_have_text("does not answer")
    page.unroute("**/ready")
    expect(page.locator("#state")).to_have_text("ready, canary unreferenced")
