"""page.html in headless Chromium, beside the files of a real run, served as `python -m http.server` serves them."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

webdriver = pytest.importorskip("selenium.webdriver")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not DRIVER, reason="no chromedriver: apt-get install chromium chromium-driver")
ARGUMENTS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """The folder of a real run of six steps."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    words = ["STEPS=6", "EVAL_EVERY=3", "SAVE_EVERY=0", "BETA=0", "PROMPTS_PER_STEP=2", "GROUP_SIZE=4", "LR=1e-3"]
    done = subprocess.run([sys.executable, "grpo_train.py", *few, *words, f"OUTPUT_DIR={folder}"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ARGUMENTS.split():
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, folder):
    """opened(width) -> the browser, with the page of `folder` in a window so wide, once it shows something."""
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def open_page(width=1280, seconds=10):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        wait(browser, "return document.querySelector('output').textContent != 'loading'", seconds)
        return browser

    yield open_page
    errors = browser.get_log("browser")
    browser.get("about:blank")
    server.shutdown()
    assert errors == []


def wait(browser, script, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (value := browser.execute_script(script)):
        text = browser.execute_script("return document.body.innerText")
        assert time.monotonic() < deadline, f"{script}: {text[:2000]}"
        time.sleep(0.05)
    return value


def shown(browser) -> dict[str, float]:
    """The values in the legends, by the metric's name."""
    return browser.execute_script("""return Object.fromEntries([...document.querySelectorAll("li")].map(item =>
        [item.firstChild.textContent.trim(), Number(item.querySelector("data").value)]))""")


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def append(folder, name, text):
    with open(folder / name, "a") as file:
        file.write(text)


PANELS = ("reward", "eval_accuracy", "accuracy", "completion_tokens_mean", "eval_tokens_mean", "kl", "clip_low_frac",
          "clip_high_frac", "clip_region_frac", "seconds", "seconds_sample", "seconds_train", "seconds_ref_wait")


def test_the_charts_hold_what_the_run_wrote(opened, folder):
    browser, metrics = opened(), rows(folder, "metrics.jsonl")
    latest = {name: next(row[name] for row in reversed(metrics) if name in row) for name in PANELS}
    assert latest.pop("kl") is None  # there is no reference
    assert latest.items() <= shown(browser).items()
    assert {"reward/reward_len", "reward/reward_format"} <= shown(browser).keys()
    # over the place of step 2 in the third chart, every chart says what step 2 was like
    browser.execute_script("""const svg = document.querySelectorAll("svg")[2], box = svg.getBoundingClientRect();
        const x = 48 + 2 / 6 * (svg.clientWidth - 62);
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + x, clientY: box.top + 9}))""")
    named = {name: value for name, value in shown(browser).items() if name in metrics[2]}
    assert named == {name: metrics[2][name] for name in named} and len(named) > 8
    # the line of the rewards is where its axis says: between the labels, from the first step to the last
    points = browser.execute_script("""return document.querySelector(".series").getAttribute("d")""")
    assert points.count("L") == 11 and "NaN" not in points


def test_a_group_stands_together_with_its_rewards_and_advantages(opened, folder):
    browser, last = opened(), rows(folder, "completions.jsonl")[-4:]
    card = browser.execute_script("return document.querySelector('article').innerText")
    assert card.startswith("Step 6\n") and "What is" in card
    boxes = browser.execute_script("""return [...document.querySelector("article").querySelectorAll(".completion")]
        .map(box => ["b", "p"].map(name => box.querySelector(name).textContent))""")
    assert [text for _, text in boxes] == [row["completion"] for row in last]
    assert [float(number) for number, _ in boxes] == [pytest.approx(row["advantage"], abs=0.005) for row in last]
    browser.execute_script("const box = document.querySelector('input'); box.value = 'step 2'; box.oninput()")
    headings = browser.execute_script("return [...document.querySelectorAll('h3')].map(node => node.textContent)")
    assert headings == ["Step 2"]


def test_what_is_appended_appears_and_nothing_else_is_parsed_again(opened, folder):
    browser = opened()
    browser.execute_script("parsed = 0; const parse = JSON.parse; JSON.parse = text => (parsed++, parse(text))")
    row = rows(folder, "metrics.jsonl")[-1] | {"step": 7, "reward": 123.5, "kl": None, "new/metric": 1.0}
    text = json.dumps(row)
    append(folder, "metrics.jsonl", text[:40])  # half a line
    time.sleep(4.5)
    assert browser.execute_script("return [parsed, metrics.rows.length]") == [0, 7]
    append(folder, "metrics.jsonl", text[40:] + "\n")
    wait(browser, "return metrics.rows.length == 8")
    assert browser.execute_script("return parsed") == 1 and shown(browser)["reward"] == 123.5
    wait(browser, "return document.title.startsWith('step 7 of 6')")


def test_a_resumed_run_rewinds_its_files(opened, folder):
    browser, lines = opened(), (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert browser.execute_script("return metrics.rows.length") == 7
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    wait(browser, "return metrics.rows.length == 4", 15)
    longer = [line.replace('"reward": ', '"reward":     ') for line in lines]
    (folder / "metrics.jsonl").write_text("".join([*longer, *longer]))  # it has grown, but out of another beginning
    wait(browser, "return metrics.rows.length == 14", 15)


def test_text_from_a_model_stays_text(opened, folder):
    evil = "<img src=x onerror='document.title=1'><script>window.evil = 1</script>"
    row = rows(folder, "completions.jsonl")[-1] | {"step": 9, "prompt": evil, "completion": evil}
    append(folder, "completions.jsonl", json.dumps(row) + "\n")
    browser = opened()
    wait(browser, "return document.querySelector('article').innerText.includes('onerror')")
    assert browser.execute_script("return document.querySelectorAll('img, article script').length") == 0
    assert browser.execute_script("return window.evil") is None


def test_it_says_whether_the_run_is_alive(opened, folder):
    metrics = folder / "metrics.jsonl"
    assert opened().title.endswith("finished")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert "alive" in opened().title
    an_hour_ago = time.time() - 3600
    os.utime(metrics, (an_hour_ago, an_hour_ago))
    assert opened().title == "step 5 of 6, silent for 60 minutes"
    metrics.unlink()
    (folder / "completions.jsonl").unlink()
    assert opened().title == "no metrics yet"
    opened().get_log("browser")  # Chromium's own lines about the missing files


def test_dark_light_and_a_phone(opened):
    colours = []
    for scheme in "light", "dark":
        browser = opened(width=390)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        colours.append(browser.execute_script("return ['backgroundColor', 'color'].map(name => "
                                              "getComputedStyle(document.documentElement)[name])"))
        assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len({*colours[0], *colours[1]}) == 4


def test_ten_thousand_steps(opened, folder):
    metrics, group = rows(folder, "metrics.jsonl")[-1], rows(folder, "completions.jsonl")[-4:]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics | {"step": i}) + "\n" for i in range(10_000)))
    (folder / "completions.jsonl").write_text("".join(
        json.dumps(row | {"step": i}) + "\n" for i in range(10_000) for row in group))
    start = time.monotonic()
    browser = opened(seconds=30)
    wait(browser, "return metrics.rows.length == 10000 && completions.rows.length == 10000", 30)
    first = time.monotonic() - start
    update = browser.execute_script("""const start = performance.now(); showMetrics(); showGroups();
        return performance.now() - start""")
    nodes = browser.execute_script("return document.querySelectorAll('*').length")
    print(f"10,000 steps: {first:.1f} s to the first picture, {update:.0f} ms to draw, {nodes} nodes")
    assert first < 10 and update < 1000 and nodes < 2000
