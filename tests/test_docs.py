"""The site of `docs/`: it builds, has all public names, and works in a browser."""

import html
import html.parser
import json
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest
from test_compare_show import CHROMIUM, needs_chromium

import hk_stack

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning would be an error."""
    out = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-E", str(DOCS), str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class Page(html.parser.HTMLParser):
    """What a page links to, and where it can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names.add(found.get("id"))
        link = found.get("href") or found.get("src")
        if link and not urllib.parse.urlparse(link).scheme and tag != "script":
            self.links.append(link.split("?")[0])


def pages(site):
    return {path: Page(path) for path in sorted(site.glob("*.html"))}


def test_no_link_is_dead(site):
    found = pages(site)
    assert len(found) > 15
    dead = [
        f"{path.name}: {link}"
        for path, page in found.items()
        for link in page.links
        for file, _, name in [link.partition("#")]
        for target in [(site / urllib.parse.unquote(file)) if file else path]
        if not target.exists()
        or (name and target in found and name not in found[target].names)
    ]
    assert not dead


def is_own(name, value, module):
    return not name.startswith("_") and getattr(value, "__module__", "") == module


def test_every_public_name_is_in_the_reference(site):
    found = pages(site)[site / "reference.html"].names
    names = {str(name).removeprefix("module-") for name in found}
    here = "hk_stack.checkpoint"
    public = {
        "hk_stack": hk_stack.__all__,
        "hk_stack.port": hk_stack.port.__all__,
        here: [n for n, x in vars(hk_stack.checkpoint).items() if is_own(n, x, here)],
    }
    expected = {f"{at}.{name}" for at, there in public.items() for name in there}
    same = {f"hk_stack.port.{name}" for name in ("flax_to_haiku", "haiku_to_flax")}
    assert expected - same <= names


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert {path.stem for path in DOCS.glob("*.md")} == {*menu, "index"}


PROBE = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<script>
const found = {}, names = NAMES;
function look() {
  if (names.length == Object.keys(found).length) {
    document.documentElement.dataset.found = JSON.stringify(found);
    return;
  }
  const frame = document.createElement("iframe");
  const name = names[Object.keys(found).length];
  frame.width = WIDTH;
  frame.onload = () => {
    const page = frame.contentDocument;
    found[name] = {
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      width: page.documentElement.scrollWidth,
      pictures: [...page.images].filter(x => !x.naturalWidth).length,
      text: page.body.innerText.length,
    };
    look();
  };
  frame.src = name;
  document.body.append(frame);
}
onload = look;
</script><body></body>"""


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "is_dark", "width"), [(0, True, 1200), (1, False, 400)]
)
def test_pages_in_a_browser(site, tmp_path, scheme, is_dark, width):
    names = sorted(path.name for path in pages(site))
    host = site / "all_pages.htm"
    probe = PROBE.replace("NAMES", json.dumps(names)).replace("WIDTH", str(width))
    host.write_text(probe)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--allow-file-access-from-files", "--virtual-time-budget=60000"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path}"),
            *(f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"),
            host.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not re.findall(r".*CONSOLE.*(?:Uncaught|Failed|rror).*", done.stderr)
    text = re.search('<html[^>]* data-found="([^"]*)"', done.stdout)[1]
    found = json.loads(html.unescape(text))
    assert sorted(found) == names
    for name, page in found.items():
        light = sum(map(int, re.findall(r"\d+", page["background"])[:3])) / (3 * 255)
        assert light < 0.3 if is_dark else light > 0.9, name
        assert page["width"] <= width, name
        assert page["text"] > 200 and not page["pictures"], name
