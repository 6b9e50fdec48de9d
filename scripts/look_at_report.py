"""Look at a report as people will: draw it in light, in dark and for print, in headless Chromium.

python scripts/look_at_report.py runs/demo-282669fc --out /tmp/looks

Needs `chromium`, or what CHROMIUM names. Exits with 1 if a chart has no marks, if text is cut off or smaller than 8 px,
if anything in the page would run or be loaded, or if the browser complains.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lamina.report import PAGE, read

THEMES = {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}
CHECK = """
<script>
addEventListener("load", () => {
  const empty = [...document.querySelectorAll("svg")].filter(svg => {
    const box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll("circle,polyline,rect,polygon")].filter(each => each.getBBox().width > 0);
    return box.width < 50 || box.height < 30 || !marks.length;
  });
  const cut = [...document.querySelectorAll("svg text")].filter(text => {
    const a = text.getBBox(), b = text.ownerSVGElement.viewBox.baseVal;
    return a.x < -1 || a.y < -1 || a.x + a.width > b.width + 1 || a.y + a.height > b.height + 1;
  });
  const tiny = [...document.querySelectorAll("svg")].filter(
    svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width < 8);
  const wide = document.documentElement.scrollWidth > innerWidth;
  const said = [...empty.map(s => "empty chart: " + s.getAttribute("aria-label")),
                ...tiny.map(s => "text too small to read in " + s.getAttribute("aria-label")),
                ...cut.map(t => `text cut off in ${t.ownerSVGElement.getAttribute("aria-label")}: ${t.textContent}`),
                ...(wide ? ["the page is wider than the window"] : [])];
  const out = document.createElement("pre");
  out.id = "verdict";
  out.textContent = said.join("\\n") || "fine";
  document.body.append(out);
});
</script></body>
"""


def browser(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window, in a profile of its own."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        sys.exit("error: there is no chromium; install it, or name it in CHROMIUM")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}"]
        command = [found, *options, "--virtual-time-budget=2000", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


def verdict(page: str, width: int) -> list[str]:
    """What is wrong with a page in a window so wide: empty charts, text that is cut off, errors of the browser."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page.replace("</body>", CHECK), encoding="utf-8")
        done = browser(f"--window-size={width},2000", "--enable-logging=stderr", "--dump-dom", path.as_uri())
    found = re.search(r'<pre id="verdict">(.*?)</pre>', done.stdout, re.DOTALL)
    said = found.group(1).splitlines() if found else ["the check itself did not run"]
    said += [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return [f"{width} px: {line}" for line in said if line != "fine"]


def main() -> None:
    """Draw, check, and say where the pictures are."""
    parser = argparse.ArgumentParser(description="Draw a report in light, in dark and for print, and check it.")
    parser.add_argument("folder", type=Path, help="of a run or a comparison")
    parser.add_argument("--out", type=Path, default=Path("looks"), help="where the pictures go")
    parser.add_argument("--tall", type=int, default=3600, help="height of the pictures in pixels")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path, page = (given.out / PAGE).resolve(), read(given.folder).html
    path.write_text(page, encoding="utf-8")
    wrong = [f"the page has {what}" for what in ("<script", "http://", "https://", "@import", "url(") if what in page]
    for width in (1200, 420):
        wrong += verdict(page, width)
    for theme, options in THEMES.items():
        picture = given.out.resolve() / f"{theme}.png"
        browser(f"--window-size=1040,{given.tall}", f"--screenshot={picture}", *options, path.as_uri())
        print(picture)
    (given.out / "print.html").write_text(page.replace("@media print", "@media all"), encoding="utf-8")
    picture = given.out.resolve() / "print.png"
    address = (given.out.resolve() / "print.html").as_uri()
    browser(f"--window-size=760,{given.tall}", f"--screenshot={picture}", address)
    print(picture)
    printed = given.out.resolve() / "print.pdf"
    browser("--no-pdf-header-footer", f"--print-to-pdf={printed}", path.as_uri())
    print(printed)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
