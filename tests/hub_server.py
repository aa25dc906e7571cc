"""The calls of the Hugging Face Hub that pushing and downloading a model make, on this machine."""

import base64
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote


class HubServer(http.server.ThreadingHTTPServer):
    """
    Keeps the files of repositories in ``repos``, by commit; the key "main" is the last commit. All
    that it is sent is in ``received``: (method, path, headers, body).
    """

    daemon_threads = True

    def __init__(self):
        self.repos, self.private, self.objects, self.received = {}, {}, {}, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, repo, files):
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[sha] = files
        self.repos[repo]["main"] = sha
        return sha


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content=b"", status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status, code, message):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def handle_all(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, unquote(self.path).partition("?")[0].strip("/").split("/")
        hub.received.append((self.command, self.path, str(self.headers), body))
        if path == ["api", "validate-yaml"]:
            known = "license: mit" in json.loads(body)["content"]
            errors = [] if known else [{"message": '"license" must be one of [mit]'}]
            self.answer({"errors": errors, "warnings": []}, 200 if known else 400)
        elif path == ["api", "repos", "create"]:
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if given["organization"] != "marie":
                self.fail(403, "Forbidden", f"You cannot write to {given['organization']}.")
            elif repo in hub.repos:
                self.answer({"url": f"{hub.url}/{repo}"}, 409)
            else:
                hub.repos[repo] = {}
                hub.private[repo] = given.get("visibility") == "private"
                self.answer({"url": f"{hub.url}/{repo}"})
        elif path[0] == "objects":
            hub.objects[path[1]] = body
            self.answer()
        elif path[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            actions = {o["oid"]: {"href": f"{hub.url}/objects/{o['oid']}"} for o in objects}
            objects = [{**o, "actions": {"upload": actions[o["oid"]]}} for o in objects]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.handle_repo(path, body)

    def handle_repo(self, path, body):
        path = path[2:] if path[:2] == ["api", "models"] else path
        repo, (call, *rest) = "/".join(path[:2]), path[2:] or [""]
        commits = self.server.repos.get(repo)
        if commits is None:
            return self.fail(404, "RepoNotFound", "Repository not found")
        if call == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if p.endswith((".safetensors", ".jpg")) else "regular" for p in paths]
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes)
            ]
            return self.answer({"files": files})
        if call == "commit":
            files = dict(commits.get(commits.get("main"), {}))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = self.server.commit(repo, files)
            return self.answer({"commitUrl": f"{self.server.url}/{repo}", "commitOid": sha})
        revision = rest[0] if rest else "main"
        sha = commits.get("main", "0" * 40) if revision == "main" else revision
        if sha not in commits and revision != "main":
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        files = commits.get(sha, {})
        if call in ("", "revision"):
            private = self.server.private.get(repo, False)
            return self.answer({"id": repo, "sha": sha, "private": private, "siblings": []})
        if call == "tree":
            listed = [
                {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for p, d in files.items()
            ]
            return self.answer(listed)
        data = files["/".join(rest[1:])]  # "resolve"
        return self.answer(data, X_Repo_Commit=sha, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def log_message(self, *args):
        pass
