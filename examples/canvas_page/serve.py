"""Serve the page that shows two answers side by side as they are decided.

python examples/canvas_page/serve.py --server http://localhost:8000

The page talks to that server from the browser; its README says how to start one that shows
canvases.
"""

import argparse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

PAGE: Final = Path(__file__).with_name("index.html")


class PageHandler(BaseHTTPRequestHandler):
    """Answers `/` with the page, all else with 404."""

    def do_GET(self) -> None:
        if urlsplit(self.path).path not in ("/", "/index.html"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = PAGE.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # An edited page is seen at the next load.
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the address is all that the terminal needs to show."""


def page_server(host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, not yet running; port 0: one that is free."""
    return ThreadingHTTPServer((host, port), PageHandler)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--server", default="http://localhost:8000", help="of `vllm serve`")
    parser.add_argument("--host", default="127.0.0.1", help="of the page")
    parser.add_argument("--port", type=int, default=8090, help="of the page")
    options = parser.parse_args()
    with page_server(options.host, options.port) as server:
        host, port = server.server_address[:2]
        query = urlencode({"server": options.server})
        print(f"Open http://{host!s}:{port}/?{query} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
