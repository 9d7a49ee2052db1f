"""``python -m v4_ascend.deploy.healthy``: a container's health check, without curl.

Exit 0 if the front of every deployment of this user answers; also if nothing is deployed, as a
container may run `plan` or `doctor`.
"""

from __future__ import annotations

import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from v4_ascend.deploy.state import running

TIMEOUT_SECONDS = 5.0


def main() -> None:
    """Ask each; say which does not answer."""
    ask = build_opener(ProxyHandler({})).open  # what runs here is not behind a proxy
    for deployment in running():
        if deployment.phase == "starting":
            continue  # it does not listen yet, and ends by itself if it cannot
        url = f"{deployment.url}/health"
        try:
            ask(url, timeout=TIMEOUT_SECONDS).close()
        except (URLError, OSError) as e:  # a status of 400 and above is a URLError too
            sys.exit(f"{deployment.name}: {url}: {e}")


if __name__ == "__main__":
    main()
