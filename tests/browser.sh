#!/usr/bin/env bash
# The tests of chat_web.py's page in a real browser, headless: Debian's packages chromium and
# chromium-driver, installed where they are missing (as root). Arguments go to pytest. Without a way
# to have them the tests are skipped, with the reason; BROWSER_TESTS_REQUIRED=1, as in CI, makes that
# a failure. Screenshots of the page are left in $BROWSER_SCREENSHOTS (default /tmp/speedrun-page).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup_venv.sh
setup_venv requirements-test.txt
if ! command -v chromium > /dev/null || ! command -v chromedriver > /dev/null; then
    why=""
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        why="chromium and chromedriver are not installed"
    else
        { apt-get update -qq || true
          DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
              -o DPkg::Lock::Timeout=120 chromium chromium-driver fonts-dejavu-core
        } < /dev/null > /tmp/apt-chromium.log 2>&1 || why="apt-get could not install chromium"
    fi
    if [ -n "$why" ]; then
        echo "no browser here: $why" >&2
        if [ -z "${BROWSER_TESTS_REQUIRED:-}" ]; then exit 0; fi
        tail -n 5 /tmp/apt-chromium.log >&2 || true
        exit 1
    fi
fi
exec python -m pytest -q --durations=3 tests/browser/scenarios.py "$@"
