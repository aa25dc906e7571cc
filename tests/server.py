"""An HTTP server for tests, on this machine."""

import http.server
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; counts requests; sends only the first ``cut`` bytes if that is given."""

    def __init__(self):
        self.files, self.requests, self.cut, self.delay = {}, 0, None, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        data = self.server.files.get(self.path.strip("/"))
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: self.server.cut])
        self.wfile.flush()
        time.sleep(self.server.delay)

    def log_message(self, *args):
        pass
