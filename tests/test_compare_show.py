"""Results as people see them: tables, Markdown, pictures, a page, and two compared."""

import html
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from hk_stack import _table
from hk_stack.compare import against, draw, page, results, show

pytest.importorskip("matplotlib")

WAYS = ["haiku layer_stack", "haiku loop", "hk_stack auto", "linen scan"]
SPEED = dict(zip(WAYS, [1.0, 2.0, 0.5, 1.5], strict=True))
VOID = {"meta", "link", "br", "img", "hr", "input"}


def row(way, layers=4, mode="grad", factor=1.0, speed=None, **measures):
    """A way at so many times the baseline's time and memory, with 1 % of noise."""
    rng = np.random.default_rng([layers, *way.encode()])
    speed = layers * (SPEED.get(way, 1.0) if speed is None else speed)
    noise = 1 + 0.01 * rng.random((3, 5))
    case = results.Case("s4", mode, layers, "float32", 4, 256, 64)
    found = {
        "trace_s": [0.2] * 3,
        "lower_s": [0.1] * 3,
        "compile_s": list(noise[:, 0] * speed),
        "first_s": [0.01] * 3,
        "run_s": (noise * speed * factor * 1e-3).tolist(),
        "temp_bytes": [int(1e6 * speed * factor)],
        "argument_bytes": [2_000_000],
        "output_bytes": [1_000_000],
    }
    return results.Row(case, way, found | measures, {"output": 2e-7})


def result(rows=None, failed=(), skipped=(), **environment):
    if rows is None:
        rows = [row(way, layers) for layers in (4, 16) for way in WAYS]
    found = {
        "device": "cpu",
        "cores": 2,
        "python": "3.11.7",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "date": "2026-11-25",
        "command": "python -m hk_stack.compare --layers=4,16",
        "flags": {"baseline": "haiku layer_stack", "layers": [4, 16]},
    }
    return results.Result(found | environment, rows, list(failed), list(skipped))


def failure(found, error="ValueError: broken"):
    return results.Failure(found.case, found.way, error)


# Tables


def shown(found, case=0):
    """The table of a case, as lines."""
    return _table.aligned(show.table(found, found.cases()[case]))


def test_table_has_times_ratios_and_stars():
    titles, *rows = shown(result())
    base, loop, ours, _ = rows
    assert re.split("  +", titles.strip()) == [
        *("way", "run, ms", "ratio [95 %]", "build, s", "ratio", "temp, MB"),
        *("ratio", "parity"),
    ]
    assert re.search(r"^  haiku layer_stack +4\.0\d +1 .* 2e-07", base)
    assert re.search(r"(2\.0|1\.9)\d \[1\.9", loop) and "*" not in loop
    assert re.search(r"2\.0\d +0\.50 \[0\.\d+, 0\.\d+\]\*", ours)
    text = show.caption(result(), result().cases()[0])
    assert text == "ratios are to haiku layer_stack"


def test_table_fits_100_columns():
    rows = [row(way) for way in [*WAYS, "linen nn.scan + setup_first"]]
    assert max(map(len, shown(result(rows)))) <= 100


def test_table_names_failures():
    rows = [row(way) for way in WAYS]
    lines = shown(result(rows, [failure(row("nnx scan"))]))
    assert lines[-1].strip() == "nnx scan           failed: ValueError: broken"


def test_table_of_ways_that_lack_measures():
    rows = [row(WAYS[0]), row(WAYS[1])._replace(measures={"run_s": [[0.004]]})]
    assert re.search(r"haiku loop +4\.00 .* - +- ", "\n".join(shown(result(rows))))


def test_eager_runs_have_columns_of_their_own():
    rows = [row(way)._replace(measures={"eager_s": [[1.0, 1.1]]}) for way in WAYS]
    titles, first, *_ = shown(result(rows))
    assert "eager, ms" in titles and "run, ms" not in titles and "1,050" in first


def test_all_that_noise_cannot_tell_apart_are_best():
    """Not told from the lowest, that is: a baseline of much noise makes nobody best."""
    base = np.linspace(1, 9, 15)
    times = {"noisy": base, "low": 0.1 + base % 0.01, "same": 0.1 + base % 0.011}
    times["more"] = 1.2 * times["low"]
    rows = [row(x, run_s=[list(t)])._replace(way=x) for x, t in times.items()]
    found = show.lines(result(rows), rows[0].case)
    assert {x.row.way for x in found if "run_s" in x.best} == {"low", "same"}
    alike = result(rows[1:3])
    assert not any("run_s" in x.best for x in show.lines(alike, rows[0].case))


def test_the_deepest_cases_are_shown_beside_one_another():
    rows = [row(way, n) for n in (4, 16) for way in WAYS]
    table = show.glance(result(rows[:-1], [failure(rows[-1])]))
    assert list(table.titles) == ["way", "s4, grad, 16 layers"]
    assert [way for way, _ in table.rows] == WAYS
    _, ratios = zip(*table.rows, strict=True)
    assert ratios == ("1", "2.00", "0.50*", "failed")  # As in the case's own column.


def test_markdown_has_a_table_for_each_case():
    rows = [row(way, n, m) for m in ("fwd", "grad") for n in (4, 16) for way in WAYS]
    text = show.markdown(result(rows, [failure(rows[0]._replace(way="nnx | _scan"))]))
    assert text.count("| way | run, ms | ratio \\[95 %\\] |") == 4
    assert "### s4, fwd, 4 layers" in text and "### s4, grad, 16 layers" in text
    assert "jax 0.10.2" in text
    assert r"| nnx \| \_scan | failed: ValueError: broken |" in text
    tables = [x for x in text.splitlines() if x.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", x)) == 9 for x in tables)


# Pictures


def test_pictures_have_a_transparent_ground_and_text():
    pictures = list(draw.pictures(result()))
    about = "s4_grad_float32_b4_t256_d64"
    assert [x.name for x in pictures] == [f"ratios_{about}", f"scaling_{about}"]
    for picture in pictures:
        assert picture.svg.startswith("<svg") and ">hk_stack auto<" in picture.svg
        assert "fill: #ffffff" not in picture.svg
        assert picture.svg.count("batch 4") == 1  # In the <title>, which is not drawn.


def test_pictures_are_the_same_each_time():
    once, again = ([p.svg for p in draw.pictures(result())] for _ in range(2))
    assert once == again


def test_one_depth_has_ratios_only_and_eager_runs_have_both():
    rows = [row(way)._replace(measures={"eager_s": [[1.0]]}) for way in WAYS]
    (picture,) = draw.pictures(result(rows))
    assert "eager, ratio" in picture.svg
    rows += [r._replace(case=r.case._replace(layers=9)) for r in rows]
    _, picture = draw.pictures(result(rows))
    assert "eager, ms" in picture.svg


def test_ratios_are_on_linear_axes_and_large_ones_are_numbers():
    speed = {WAYS[0]: 1, WAYS[1]: 5, WAYS[2]: 1.2}
    found = result([row(way, n, speed=s) for n in (4, 16) for way, s in speed.items()])
    panels = draw.ratios(found, found.cases()).axes
    assert len(panels) == 3
    for axes in panels:
        assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
        (number,) = axes.texts  # Of the deepest case.
        assert re.fullmatch(r" → (4\.9|5\.0)\d", number.get_text())
    points = panels[2].collections[-1].get_offsets().tolist()
    assert points == [[1, 0], [pytest.approx(1.2, abs=0.01), 2]]


def test_13_lines_can_be_told_apart():
    ways = [f"nnx {i}" for i in range(13)]
    found = result([row(way, n) for n in (4, 16) for way in ways])
    axes, _ = draw.scaling(found, found.cases()).axes
    assert len({line.get_marker() for line in axes.lines}) == 13
    assert [line.get_label() for line in axes.lines] == ways


# The page


class Parsed(html.parser.HTMLParser):
    """Which elements a page has, whether they are closed, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.wrong = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def whole():
    rows = [row(way, n, m) for m in ("grad", "init") for n in (4, 16) for way in WAYS]
    skipped = [{"what": "penzai", "why": "pip install penzai"}]
    found = result(rows, [failure(row("nnx scan"))], skipped)
    return page.html(found, list(draw.pictures(found)))


def test_page_is_well_formed_and_loads_nothing(whole):
    parsed = Parsed(whole)
    assert not parsed.wrong and not parsed.open
    assert "script" not in parsed.tags and "link" not in parsed.tags
    for tag, attributes in parsed.attributes:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in whole and not re.search(r"url\((?!#)", whole)
    ids = [a["id"] for _, a in parsed.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for _, a in parsed.attributes if "href" in a]
    assert set(links) <= set(ids)


def test_page_can_be_read_aloud(whole):
    parsed = Parsed(whole)
    assert parsed.tags.count("table") == parsed.tags.count("caption")
    assert all("scope" in a for tag, a in parsed.attributes if tag == "th")
    pictures = [a for _, a in parsed.attributes if a.get("role") == "img"]
    assert len(pictures) == parsed.tags.count("svg") == 4
    assert all("s4" in a["aria-label"] for a in pictures)
    headings = [int(tag[1]) for tag in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_a_result_that_was_stopped_says_so():
    title = "mlp, fwd, 8 layers, float32, batch 4, length 256, width 64"
    found = results.merged([result(unfinished=[title]), result([row("nnx scan", 9)])])
    for text in (page.html(found, []), show.markdown(found)):
        assert f"Partial: stopped before these cases were whole: {title}." in text
    assert "Partial" not in page.html(result(unfinished=[]), []) + show.markdown(
        result()
    )


def test_page_has_each_title_once(whole):
    """In a heading, the list of them, and for those who cannot see it."""
    seen = re.sub(r' aria-label="[^"]*"|<title>.*?</title>', "", whole)
    assert seen.count("s4, grad, float32, batch 4, length 256, width 64") == 2
    assert not re.search(r"\d layers, float32, batch", seen.split("problems")[0])


def test_page_tells_what_was_measured(whole):
    for text in (
        "4 ways to run a layer stack, in 4 cases",
        "jax 0.10.2",
        "0.50 [0.",
        "failed: ValueError: broken",
        "pip install penzai",
        "python -m hk_stack.compare --layers=4,16",
        "2e-07",
        "temporary memory, bytes",
    ):
        assert text in whole, text


def test_names_are_never_html():
    bad = "<script>alert(1)</script>$x_1$&"
    rows = [row(way, n) for n in (4, 16) for way in (WAYS[0], bad)]
    rows = [r._replace(case=r.case._replace(model='"><img src=x>')) for r in rows]
    skipped = [{"what": bad, "why": bad}]
    found = result(rows, [failure(rows[1], bad)], skipped, device=bad, command=bad)
    parsed = Parsed(page.html(found, list(draw.pictures(found))))
    assert not parsed.wrong and not parsed.open
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert "<script" not in show.markdown(found).replace(r"\<", "")


# The page in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)
PROBE = """<script>
const style = getComputedStyle(document.body);
const shown = [...document.querySelectorAll("svg")].filter(
  x => x.getBoundingClientRect().width > 0 && x.getBoundingClientRect().height > 0);
const measured = [...document.querySelectorAll("table.measured")];
measured.forEach(x => { x.parentElement.scrollLeft = 10000; });
parent.document.documentElement.dataset.found = JSON.stringify({
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  page: style.backgroundColor,
  tables: document.querySelectorAll("table").length,
  pictures: shown.length,
  content: document.documentElement.scrollWidth,
  window: innerWidth,
  first: measured.map(x => Math.round(x.querySelector("th").getBoundingClientRect().left
    - x.parentElement.getBoundingClientRect().left)),
  hidden: measured.map(x => Math.round(x.querySelector("th:last-child")
    .getBoundingClientRect().right - x.parentElement.getBoundingClientRect().right)),
});
</script>"""


def browse(tmp_path, text, *arguments):
    """What Chromium writes of a page."""
    file = tmp_path / "page.html"
    file.write_text(text)
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
        *("--disable-component-update", "--disable-sync", *arguments),
        *(f"--user-data-dir={tmp_path / 'chromium'}", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "background"), [(0, "rgb(17, 17, 17)"), (1, "rgb(255, 255, 255)")]
)
def test_page_in_a_browser_on_a_phone(whole, tmp_path, scheme, background):
    dark = f"--blink-settings=preferredColorScheme={scheme}"
    inside = html.escape(whole.replace("<details>", "<details open>") + PROBE)
    # Chromium has no windows as narrow as a phone, but frames.
    frame = (
        '<!DOCTYPE html><meta name="color-scheme" content="light dark">'
        f'<iframe width="500" height="900" srcdoc="{inside}"></iframe>'
    )
    text = browse(tmp_path, frame, dark, "--dump-dom")
    found = json.loads(
        html.unescape(re.search('<html[^>]* data-found="([^"]*)"', text)[1])
    )
    assert found["dark"] == (scheme == 0) and found["page"] == background
    assert found["tables"] == whole.count("<table") and found["pictures"] == 4
    assert found["content"] <= found["window"] == 500
    # Of each table, the names of ways stay, and the last column can be scrolled to.
    assert found["first"] and set(found["first"]) == {0}
    assert max(found["hidden"]) == 0


@needs_chromium
@pytest.mark.parametrize("scheme", [0, 1])
def test_page_is_painted(whole, tmp_path, scheme):
    import matplotlib.image

    shot = tmp_path / "shot.png"
    dark = f"--blink-settings=preferredColorScheme={scheme}"
    browse(tmp_path, whole, dark, "--window-size=900,2400", f"--screenshot={shot}")
    image = matplotlib.image.imread(shot)[..., :3]
    assert image.shape == (2400, 900, 3)
    background, light = image[0, 0], image.mean(-1)
    assert (background.mean() < 0.1) if scheme == 0 else (background.mean() == 1)
    painted = np.abs(light - background.mean()) > 0.3
    assert 0.01 < painted.mean() < 0.5
    # Text is in the upper half, a picture and a table in the lower half.
    assert painted[:1200].mean() > 0.01 and painted[1200:].mean() > 0.01


# Two results


def test_the_same_has_not_moved():
    text, is_worse = against.report(result(), result())
    assert not is_worse
    assert text == "0 ratios are worse and 0 are better, of 8 rows in both results"


def changed(way, factor):
    return [
        row(w, n, factor=factor if (w, n) == (way, 16) else 1.0)
        for n in (4, 16)
        for w in WAYS
    ]


def test_slower_is_worse_and_named():
    moves = against.moved(result(), result(changed("hk_stack auto", 1.5)))
    assert {(m.way, m.measure, m.case.layers) for m in moves} == {
        ("hk_stack auto", "run_s", 16),
        ("hk_stack auto", "temp_bytes", 16),
    }
    assert all(m.is_worse for m in moves)
    text, is_worse = against.report(result(), result(changed("hk_stack auto", 1.5)))
    assert is_worse and "2 ratios are worse and 0 are better" in text
    line = next(x for x in text.splitlines() if " run " in x)
    assert "16 layers" in line and "hk_stack auto" in line and "x 1.50" in line


def test_faster_is_better():
    text, is_worse = against.report(result(), result(changed("linen scan", 0.5)))
    assert not is_worse and "0 ratios are worse and 2 are better" in text


def test_a_machine_of_half_the_speed_changes_no_ratio():
    slow = [row(way, n, factor=2) for n in (4, 16) for way in WAYS]
    assert against.moved(result(), result(slow)) == []


@pytest.mark.parametrize(
    ("measures", "has_moved"),
    [
        ({"temp_bytes": [2_010_000]}, False),  # By half a percent.
        ({"temp_bytes": [2_100_000]}, True),
        ({"compile_s": [2.4], "trace_s": [0.2], "lower_s": [0.1]}, False),
        ({"compile_s": [9.0], "trace_s": [0.2], "lower_s": [0.1]}, True),
        ({"run_s": [[0.0024]]}, False),
        ({"run_s": [[0.009]]}, True),
    ],
)
def test_few_samples_have_to_differ_by_more(measures, has_moved):
    old, new = (
        result([row(WAYS[0]), row("hk_stack auto", **more)]) for more in ({}, measures)
    )
    assert bool(against.moved(old, new)) == has_moved


def test_eager_calls_are_compared():
    def rows(seconds):
        times = {WAYS[0]: 1.0, "hk_stack auto": seconds}
        calls = {way: [[t, t * 1.01, t]] for way, t in times.items()}
        return [row(w)._replace(measures={"eager_s": t}) for w, t in calls.items()]

    (move,) = against.moved(result(rows(1.0)), result(rows(3.0)))
    assert move.measure == "eager_s" and move.is_worse


def test_rows_of_one_result_only_are_named():
    rows = [row(way, n) for n in (4, 16) for way in WAYS]
    text, is_worse = against.report(result(rows), result(rows[:-1]))
    assert "in the old result only:" in text and "16 layers" in text
    assert "linen scan" in text and not is_worse
    assert "in the new result only:" in against.report(result(rows[:-1]), result())[0]


def test_what_fails_now_is_worse():
    rows = [row(way, n) for n in (4, 16) for way in WAYS]
    text, is_worse = against.report(
        result(rows), result(rows[:-1], [failure(rows[-1])])
    )
    assert is_worse and "failed, and did not in the old result:" in text
    assert "in the old result only" not in text


def test_other_versions_are_named():
    new = result(versions={"jax": "0.11.0", "flax": "0.12.8"}, device="H100")
    text, is_worse = against.report(result(), new)
    assert "not alike: device cpu -> H100, jax 0.10.2 -> 0.11.0" in text
    assert not is_worse


def test_baselines_have_to_be_the_same():
    new = result(flags={"baseline": "haiku loop"})
    with pytest.raises(
        ValueError, match="measure the new one with --baseline='haiku l"
    ):
        against.moved(result(), new)
    rows = [row(way) for way in WAYS]
    with pytest.raises(ValueError, match="failed there: ValueError: broken"):
        against.moved(result(rows), result(rows[1:], [failure(rows[0])]))


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match=r"no case is in both results.*--layers=4,16"):
        against.moved(result([row(WAYS[0], 4)]), result([row(WAYS[0], 16)]))
