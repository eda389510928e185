"""The built site in a browser without a network, as wide as a desktop and as a phone."""

import functools
import http.server
import os
import re
import shutil
import threading
import urllib.parse

import pytest

from pages import DOCS, MODULES, ROOT, in_navigation, page_of, public_names

pytest.importorskip("selenium", reason="the extra `docs` is not installed")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

SITE = ROOT / "out" / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
WIDTHS = {"desk": 1280, "phone": 390}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="run `make docs` first"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    """Its address."""
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module", params=WIDTHS)
def browser(request):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    if request.param == "phone":
        screen = {"width": WIDTHS["phone"], "height": 844, "pixelRatio": 2}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    else:
        options.add_argument(f"--window-size={WIDTHS['desk']},900")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


WIDER_THAN_THE_WINDOW = """
const width = document.documentElement.clientWidth;
return document.documentElement.scrollWidth > width || visualViewport.scale < 1;
"""
BROKEN_PICTURES = """
const pictures = [...document.images];
pictures.forEach(picture => { picture.loading = 'eager'; });
return Promise.all(pictures.map(picture => picture.decode().then(() => null, () => picture.src)))
  .then(sources => sources.filter(source => source));
"""


def test_every_page_is_whole_and_fits_the_window(site, browser, subtests):
    for page in in_navigation():
        with subtests.test(page=page):
            browser.get(f"{site}/{page}.html")
            assert browser.find_element(By.CSS_SELECTOR, ".bd-article h1").text
            assert not browser.execute_script(WIDER_THAN_THE_WINDOW)
            assert browser.execute_script(BROKEN_PICTURES) == []
            assert browser.get_log("browser") == []


def test_pages_are_reached_by_the_navigation(site, browser):
    browser.get(f"{site}/index.html")
    links = browser.find_elements(By.CSS_SELECTOR, ".bd-sidebar-primary a.reference.internal")
    reached = {link.get_attribute("href").split("#")[0] for link in links}
    assert {f"{site}/{page}.html" for page in in_navigation()} <= reached | {f"{site}/index.html"}


def test_equations_are_drawn(site, browser):
    """A fraction is higher than its line would be."""
    browser.get(f"{site}/api/rmsprop.html")
    fraction = browser.find_element(By.CSS_SELECTOR, ".equation mfrac")
    letter = browser.find_element(By.CSS_SELECTOR, ".equation mi")
    assert fraction.size["height"] > 1.5 * letter.size["height"]


def test_the_search_finds_a_page(site, browser):
    browser.get(f"{site}/index.html")
    buttons = browser.find_elements(By.CSS_SELECTOR, "button.search-button__button")
    next(button for button in buttons if button.is_displayed()).click()
    field = browser.switch_to.active_element
    field.send_keys("centered", Keys.ENTER)
    wait = WebDriverWait(browser, 20)
    wait.until(lambda browser: "search.html" in browser.current_url)
    page = (By.CSS_SELECTOR, "#search-results a[href*='api/rmsprop.html']")
    found = wait.until(lambda browser: browser.find_elements(*page))
    assert found[0].is_displayed()
    assert browser.get_log("browser") == []


def links():
    """The pages of the site, each with the links on it."""
    for page in SITE.rglob("*.html"):
        if "_static" not in page.parts:
            for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', page.read_text()):
                yield page, link


@functools.cache
def places(page):
    return {*re.findall(r'\bid="([^"]+)"', page.read_text()), ""}


def test_links_lead_somewhere():
    """From each page to a place on another, or to a file of the repository."""
    repository = re.compile(r"https://github.com/rmsprop-jax/rmsprop_jax/(blob|tree)/main/([^#]*)")
    found = {"pages": 0, "files": 0}
    for page, link in {*links()}:
        if file := repository.match(link):
            found["files"] += 1
            there = ROOT / file[2]
            assert there.is_dir() if file[1] == "tree" else there.is_file(), (page, link)
        elif not re.match(r"\w+:", link):
            found["pages"] += 1
            path, _, place = link.partition("#")
            there = page.parent / path if path else page
            assert there.resolve().is_relative_to(SITE), (page, link)
            assert there.is_file(), (page, link)
            assert urllib.parse.unquote(place) in places(there.resolve()), (page, link)
    assert found["pages"] > 500
    assert found["files"] > 20


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_names_and_they_alone_have_places_on_the_page_of_their_module(module):
    """Methods have theirs beside."""
    page = (SITE / page_of(module).relative_to(DOCS)).with_suffix(".html").read_text()
    places = set(re.findall(rf'<dt class="sig.*" id="{module.__name__}\.([\w.]+)"', page))
    assert {place for place in places if "." not in place} == public_names(module)
    assert not any(part.startswith("_") for place in places for part in place.split("."))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_signatures_are_readable(module):
    """Types are named as a caller would name them."""
    page = (SITE / page_of(module).relative_to(DOCS)).with_suffix(".html").read_text()
    for signature in re.findall(r'<dt class="sig.*?</dt>', page, re.DOTALL):
        words = re.sub(r"<[^>]+>", "", signature)
        assert not re.search(r"jaxlib|Union\[|ForwardRef|\b_\w+\.|\._\w+", words), words
