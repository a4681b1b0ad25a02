"The notebooks in a real JupyterLab, in a real browser: every cell runs, nothing goes wrong, the pictures are there."
import os, secrets, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import nbformat, psutil, pytest
from conftest import code_cells, copy_of_the_repository

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
try: from playwright.sync_api import Error, sync_playwright
except ImportError: sync_playwright = None
pytestmark = pytest.mark.skipif(not (CHROMIUM and sync_playwright), reason="needs a browser: apt-get install chromium, and playwright from PyPI")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage".split()
TROUBLE = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
STATE = """() => [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(c => ({prompt: c.querySelector('.jp-InputPrompt').innerText,
    errors: [...c.querySelectorAll(`TROUBLE`)].map(e => e.innerText)}))""".replace("TROUBLE", TROUBLE)
PICTURES = "() => [...document.querySelectorAll('.jp-OutputArea-output img')].filter(i => i.complete && i.naturalWidth > 50).length"


FORMULAS = "() => [document.querySelectorAll('.jp-MarkdownCell mjx-container').length, document.querySelectorAll('mjx-merror').length]"
OPENED = [("nbs/index.ipynb", 0, 0), ("nbs/train/0_losses.ipynb", 3, 3), ("nbs/runs/train_anonymizer.ipynb", 3, 0),
          ("nbs/runs/evaluate.ipynb", 1, 0), ("nbs/runs/attack.ipynb", 1, 0)]     # pictures drawn; formulas shown


def without_outputs(path):
    "What is seen afterwards was made afterwards."
    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    nbformat.write(nb, path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the repository, with a home, settings and a kernel of its own."
    tree, home = copy_of_the_repository(tmp_path_factory.mktemp("lab")/"repo"), tmp_path_factory.mktemp("home")
    for path, *_ in OPENED: without_outputs(tree/path)
    settings = home/"config"/"lab"/"user-settings"/"@jupyterlab"/"notebook-extension"
    settings.mkdir(parents=True)
    (settings/"tracker.jupyterlab-settings").write_text('{"windowingMode": "none", "recordTiming": false}')     # every cell is in the page
    (home/"config"/"lab"/"user-settings"/"@jupyterlab"/"apputils-extension").mkdir()
    (home/"config"/"lab"/"user-settings"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = secrets.token_hex(16)
    env = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home/"config"), "JUPYTER_DATA_DIR": str(home/"data"), "JUPYTER_RUNTIME_DIR": str(home/"runtime"),
           "JUPYTERLAB_SETTINGS_DIR": str(home/"config"/"lab"/"user-settings"), "PYTHONPATH": str(tree), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    log = open(home/"log", "w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                               "--allow-root", f"--ServerApp.root_dir={tree}"], stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        deadline = time.time() + 120
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5); break
            except OSError: assert server.poll() is None and time.time() < deadline, (home/"log").read_text()[-2000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", token, tree
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)] if server.poll() is None else []      # kernels have sessions of their own
        server.send_signal(signal.SIGTERM)
        for p in psutil.wait_procs(family, timeout=20)[1]: p.kill()
        log.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield b
        b.close()


def shots(tmp_path):
    folder = Path(os.environ.get("PENALTYANON_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("path, pictures, formulas", OPENED)
def test_run_all_cells(lab, browser, tmp_path, path, pictures, formulas):
    base, token, tree = lab
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    try:
        page.goto(f"{base}/lab/tree/{path}?token={token}&reset", wait_until="domcontentloaded")
        page.wait_for_selector(".jp-Notebook .jp-MarkdownCell h1")
        cells = len(code_cells(tree/path))
        if cells:
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
            page.click(".jp-Notebook .jp-Cell >> nth=0"); page.keyboard.press("Escape")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            wait_until_run(page, path, cells)
            drawn = page.evaluate(PICTURES)
            assert drawn >= pictures, f"{path}: {drawn} pictures are rendered, {pictures} are expected"
        else: all_pictures_of_the_text(page, path, (tree/path).read_text().count("!["))
        shown, broken = page.evaluate(FORMULAS)
        assert shown >= formulas and not broken, f"{path}: {shown} formulas are rendered, {broken} of them are wrong"
        last = page.locator(".jp-OutputArea-output img").last if pictures else page.locator(".jp-Notebook h1").first
        last.scroll_into_view_if_needed()
        page.screenshot(path=shots(tmp_path)/f"{Path(path).stem}.png")
    except Error as e:
        page.screenshot(path=shots(tmp_path)/f"{Path(path).stem}-failed.png")
        raise AssertionError(f"{path}: {e}") from e
    finally: page.close()


def all_pictures_of_the_text(page, path, expected):
    "None may be missing: the paths are relative to where the README says to start JupyterLab."
    found = "() => [...document.querySelectorAll('.jp-MarkdownCell img')].map(i => [i.getAttribute('alt') || i.src, i.complete && i.naturalWidth > 50])"
    deadline = time.time() + 30
    while len(seen := page.evaluate(found)) < expected or not all(good for _, good in seen):
        assert time.time() < deadline, f"{path}: {expected} pictures are in its text; of those in the page these are not shown: {[n for n, good in seen if not good]} ({len(seen)} found)"
        time.sleep(0.5)


def wait_until_run(page, path, cells, seconds=400):
    "Every code cell has a number, the kernel rests, and no cell holds an error or a word on stderr."
    deadline = time.time() + seconds
    while True:
        state = page.evaluate(STATE)
        wrong = [(i, c["errors"][0][-600:]) for i, c in enumerate(state) if any("Traceback" in e or "Error" in e for e in c["errors"])]
        assert not wrong, f"{path}: code cell {wrong[0][0]} ends with {wrong[0][1]}"
        if len(state) == cells and all(c["prompt"].strip("[]:").isdigit() for c in state) and page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').count(): break
        assert time.time() < deadline, f"{path}: after {seconds} s these prompts stand: {[c['prompt'] for c in state]}"
        time.sleep(0.5)
    loud = [(i, e[:300]) for i, c in enumerate(state) for e in c["errors"] if e.strip() and "it/s]" not in e and "s/it]" not in e and "%|" not in e]
    assert not loud, f"{path}: code cell {loud[0][0]} says on stderr: {loud[0][1]}"
