"""The page of chat_web.py in headless Chromium: what a person does, and what is then seen."""
import os
import sys
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_web import CONTEXT, make, serving

SHOTS = Path(os.environ.get("BROWSER_SCREENSHOTS", "/tmp/speedrun-page"))
LONG = "slow " + "x" * 60  # three seconds of answer

@pytest.fixture(scope="module")
def web(tmp_path_factory):
    state = tmp_path_factory.mktemp("page") / "state"
    state.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(state))
        make("base")
        make("sft")
    with serving(state, "--max_new_tokens=100", program="tests/echo_web.py") as web:
        yield web

@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{word}")
    browser = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield browser
    browser.quit()

class Page:
    """The page as a person has it before them."""
    def __init__(self, browser, web):
        self.browser, self.web = browser, web

    def find(self, css):
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css):
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css):
        return [one.get_attribute("textContent") for one in self.all(css)]

    def until(self, condition, what):
        WebDriverWait(self.browser, 20, 0.02).until(lambda _: condition(), what)

    def type(self, *keys):
        self.find("#said").send_keys(*keys)

    def say(self, text):
        """Says it and waits for the answer's end."""
        self.type(text, Keys.ENTER)
        self.until(self.is_quiet, f"the answer to {text!r} has not ended")

    def is_quiet(self):
        return not self.find("#stop").is_displayed()

    def answers(self):
        return self.texts(".assistant .text")

    def press(self, css, name):
        """The button with this text, the last of those there are."""
        [*_, button] = [one for one in self.all(f"{css} button") if one.text == name]
        button.click()

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.browser.save_screenshot(str(SHOTS / f"{name}.png"))

    def evaluate(self, script):
        return self.browser.execute_script(f"return {script}")

@pytest.fixture
def page(chromium, web):
    """A browser that has never been here."""
    chromium.set_window_size(1200, 800)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get(web.url)
    chromium.execute_script("localStorage.clear(); sessionStorage.clear()")
    chromium.refresh()
    page = Page(chromium, web)
    page.until(lambda: page.all("#stage option"), "the models are not listed")
    yield page
    errors = [line for line in chromium.get_log("browser") if line["level"] == "SEVERE"
              and "status of 4" not in line["message"]]  # a refused request, shown to the person
    assert not errors, errors

def test_an_answer_comes_piece_by_piece_and_stays(page):
    page.shot("empty")
    page.type(LONG, Keys.ENTER)
    page.until(lambda: 10 < len("".join(page.answers())) < 40, "it never came in pieces")
    assert page.find("#stop").is_displayed() and not page.find("#send").is_displayed()
    assert page.find("#log").get_attribute("aria-busy") == "true"
    page.shot("streaming")
    page.until(page.is_quiet, "it never ended")
    assert page.answers() == [f"You said: {LONG}"]
    assert page.find("#log").get_attribute("aria-busy") == "false"
    assert "a second" in page.texts(".assistant .tools")[0]
    assert page.evaluate("document.activeElement.id") == "said", "ready for the next"

@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped_here_and_there(page, how):
    page.type(LONG, Keys.ENTER)
    page.until(lambda: len("".join(page.answers())) > 5, "nothing came")
    if how == "button":
        page.find("#stop").click()
    else:
        page.type(Keys.ESCAPE)
    page.until(page.is_quiet, "it was not stopped")
    assert len(page.answers()[0]) < 60 and "stopped" in page.texts(".assistant .tools")[0]
    page.until(lambda: page.web.busy() == 0, "the server goes on")
    page.say("and now")
    assert page.answers()[1] == "You said: and now"

def test_a_reload_keeps_the_conversation_in_the_middle_of_an_answer_too(page):
    page.say("first")
    page.type(LONG + "y" * 40, Keys.ENTER)
    page.until(lambda: len("".join(page.answers()[1:])) > 30, "nothing came")
    page.browser.refresh()
    page.until(lambda: len(page.answers()) == 2, "the conversation is gone")
    first, cut = page.answers()
    assert first == "You said: first" and cut.startswith("You said: slow xxx")
    assert "not finished" in page.texts(".assistant .tools")[1]
    page.until(lambda: page.web.busy() == 0, "the server goes on for nobody")

def test_two_tabs_keep_out_of_each_others_way(page):
    page.say("in the first tab")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    second = page.browser.current_window_handle
    page.browser.get(page.web.url)
    try:
        page.until(lambda: page.texts("#list .open-it") == ["in the first tab"], "not listed")
        assert page.answers() == [], "a conversation of its own"
        page.say("in the second tab")
        page.browser.switch_to.window(first)
        page.until(lambda: len(page.all("#list .open-it")) == 2, "the other is not listed")
        page.say("again in the first")
        page.browser.switch_to.window(second)
        page.press("#list", "in the first tab")  # the same one in both
        page.browser.switch_to.window(first)
        page.say("third")
        page.browser.switch_to.window(second)
        page.until(lambda: len(page.answers()) == 3, "it is an old copy")
        page.say("fourth")
    finally:
        page.browser.switch_to.window(second)
        page.browser.close()
        page.browser.switch_to.window(first)
    said = ["in the first tab", "again in the first", "third", "fourth"]
    page.until(lambda: page.answers() == [f"You said: {text}" for text in said], "an old copy")
    page.browser.refresh()
    page.until(lambda: len(page.answers()) == 4, "the conversation is gone")
    page.press("#list", "in the second tab")
    assert page.answers() == ["You said: in the second tab"]

def test_a_conversation_is_removed_and_a_new_one_begun(page):
    page.say("one")
    page.find("#new").click()
    assert page.answers() == []
    page.say("two")
    assert page.texts("#list .open-it") == ["two", "one"]
    page.find("#list li:nth-child(2) .remove").click()
    page.browser.switch_to.alert.accept()
    assert page.texts("#list .open-it") == ["two"] and page.answers() == ["You said: two"]

def test_edit_regenerate_and_copy(page):
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {
        "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.say("hello")
    page.say("2+2?")
    assert page.texts(".call") == ["2+2", " = 4"] and page.answers()[1] == "It is 2+2 = 44."
    page.press(".assistant:last-child", "Regenerate")
    page.until(page.is_quiet, "it never ended")
    assert len(page.answers()) == 2 and page.answers()[1] == "It is 2+2 = 44."
    page.press(".assistant:last-child", "Copy")
    page.until(lambda: page.browser.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0])") == "It is 4.", "not copied")
    page.press("article:first-child", "Edit")
    assert page.find("#said").get_property("value") == "hello"
    page.type("!")
    page.say("")
    assert page.answers() == ["You said: hello!"] and page.texts(".user .text") == ["hello!"]

def test_what_is_said_is_text_and_never_a_script(page):
    hostile = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    page.say(hostile)
    assert page.answers() == [f"You said: {hostile}"] and not page.all(".text img, .text b")
    assert page.browser.title == "nanochat" and page.texts("#list .open-it") == [hostile[:60]]

def test_more_lines_and_characters_that_are_put_together(page):
    page.type("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two")
    page.say("")
    assert page.answers() == ["You said: one\ntwo"]

def test_the_stage_is_switched_and_the_base_model_says_what_it_is(page):
    Select(page.find("#stage")).select_by_value("base")
    assert "has not learnt to chat" in page.find(".empty").text
    assert "continues a text" in page.find("#note").text
    Select(page.find("#stage")).select_by_value("sft")
    assert page.find("#note").text == ""

def test_what_is_too_long_for_the_model_is_forgotten_and_it_says_so(page):
    for i in range(6):
        page.say(f"message {i} " + "x" * 40)
    assert len(page.answers()) == 6 and not page.find("#error").is_displayed()
    assert "is forgotten" in page.find(".forgotten").text
    articles = page.all(".forgotten ~ article")
    assert 2 < len(articles) < 12, "as much as can be read is"
    page.say("x" * CONTEXT)
    assert "context" in page.find("#error").text, "one alone that is too long is refused"
    page.say("short")
    assert page.answers()[-1] == "You said: short"
    assert len(page.all(".forgotten ~ article")) >= len(articles), "that has made nothing forgotten"

def test_where_the_server_is_gone_it_says_so_and_loses_nothing(page):
    offline(page, True)
    page.say("are you there")
    assert page.find("#error").text == "The server cannot be reached."
    offline(page, False)
    assert page.texts(".user .text") == ["are you there"]
    page.browser.get_log("browser")  # the failed request is meant
    page.say("and now")
    assert page.answers() == ["", "You said: and now"], "what was not answered is in nobody's way"

def test_a_failure_takes_no_answer_away(page):
    page.say("first")
    page.say("second")
    offline(page, True)
    page.press(".assistant:last-child", "Regenerate")
    page.until(lambda: page.find("#error").is_displayed(), "nothing is said")
    assert page.answers() == ["You said: first", "You said: second"]
    page.press("article:first-child", "Edit")
    page.say("!")
    page.until(lambda: page.find("#error").is_displayed(), "nothing is said")
    assert page.answers() == ["You said: first", "You said: second"]
    assert page.find("#said").get_property("value") == "first!", "to be sent again"
    offline(page, False)
    page.browser.get_log("browser")
    page.browser.refresh()
    page.until(lambda: len(page.answers()) == 2, "it was not kept")

def test_what_is_being_edited_stays_with_its_conversation(page):
    page.say("one")
    page.say("two")
    page.find("#new").click()
    page.say("three")
    page.press("#list", "one")
    page.press("article:first-child", "Edit")
    page.press("#list", "three")
    assert page.find("#said").get_property("value") == ""
    page.say("four")
    assert page.answers() == ["You said: three", "You said: four"]
    page.press("#list", "one")
    assert page.answers() == ["You said: one", "You said: two"]

def offline(page, on):
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {
        "offline": on, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})

def contrast(a, b):
    """WCAG 2's ratio of two colours, "rgb(1, 2, 3)"."""
    def luminance(colour):
        numbers = [float(n) / 255 for n in colour[colour.index("(") + 1:-1].split(",")[:3]]
        r, g, b = (n / 12.92 if n <= 0.03928 else ((n + 0.055) / 1.055) ** 2.4 for n in numbers)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width,height", [(1200, 800), (360, 740)])
def test_it_can_be_read_light_and_dark_wide_and_narrow(page, scheme, width, height):
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 500})
    try:
        page.say("What is the capital of a long word, " + "Donaudampfschiff" * 6 + "?")
        page.say("2+2?")
        page.shot(f"{scheme}-{width}")
        assert page.evaluate("document.documentElement.scrollWidth") == width, "no scrolling aside"
        box = page.find("#said").rect
        assert box["y"] + box["height"] <= height and box["width"] > 150
        colours = """(css => [...document.querySelectorAll(css)].map(one => {
            let under = one
            while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)")
                under = under.parentElement
            return [getComputedStyle(one).color, getComputedStyle(under).backgroundColor]
        }))(".text, .call, .tools, #said, #send, #list button, #note, .tools button, label")"""
        for ink, paper in page.evaluate(colours):
            assert contrast(ink, paper) >= 4.5, (ink, paper)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (contrast(paper, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
        if width < 500:
            assert not page.find("#side").is_displayed()
            page.find("#menu").click()
            assert page.find("#side").is_displayed()
            page.shot(f"{scheme}-{width}-menu")
            assert page.find("#menu").get_attribute("aria-expanded") == "true"
            page.press("#list", page.texts("#list .open-it")[0])
            assert not page.find("#side").is_displayed()
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

def test_a_screen_reader_finds_names_for_everything_and_the_keyboard_reaches_it(page):
    page.say("hello")
    roles = {"button", "textbox", "combobox", "slider", "log", "navigation"}
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    used = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree
            if node.get("role", {}).get("value") in roles]
    assert all(name for _, name in used), used
    assert {role for role, _ in used} == roles
    reached = set()
    for _ in range(20):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.evaluate("document.activeElement.textContent.trim() || "
                                  "document.activeElement.id"))
    assert {"hello", "Copy", "Edit", "Regenerate", "said", "heat"} <= reached, reached

def test_nothing_is_asked_of_anybody_else(page):
    page.say("hello")
    asked = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert asked and all(name.startswith(page.web.url) for name in asked), asked

def test_the_token_comes_with_the_address_and_is_kept(page, web, tmp_path):
    with serving(web.stderr.parent, "--token=secret%word", program="tests/echo_web.py") as guarded:
        page.browser.get(guarded.url.split("#")[0])
        page.until(lambda: page.find("#error").is_displayed(), "nothing is said")
        assert "token" in page.find("#error").text
        page.browser.get("about:blank")
        page.browser.get(guarded.url.split("#")[0] + "#secret%25word")
        page.until(lambda: page.all("#stage option"), "the token is not taken")
        assert "#" not in page.browser.current_url
        page.say("hello")
        assert page.answers() == ["You said: hello"]
    page.browser.get(web.url)
    page.browser.get_log("browser")

