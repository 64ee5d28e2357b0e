"""A stand-in for the hub: the part of its HTTP interface that huggingface_hub uses, on this machine."""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_standInTokenThatMustNotShow"


class StandIn:
    """Repositories in memory.

    Attributes:
        repos: "models/owner/name" -> its commits, the latest last: [(id, {path: content})].
        private: the same names -> whether only their owner sees them.
        requests: (method, path) of every request.
        failures: part of a path -> (status, message) to answer with.
        gate: uploads wait for it; open unless a test closes it.
        readers: tokens that may only read.
    """

    def __init__(self):
        self.repos, self.private, self.requests, self.failures, self.readers = {}, {}, [], {}, set()
        self.gate = threading.Event()
        self.gate.set()
        self.uploading = threading.Event()  # somebody waits at the gate
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    def make(self, name, *, private=True):
        self.repos[name] = [(_id(name), {".gitattributes": b""})]
        self.private[name] = private

    def files(self, name="models/me/lora"):
        """The latest content, without what the hub puts there."""
        return {path: data for path, data in self.repos[name][-1][1].items() if path != ".gitattributes"}

    def order(self, name="models/me/lora"):
        """Names in the order of their first upload."""
        seen = {}
        for _, files in self.repos[name]:
            seen |= dict.fromkeys(files)
        return [path for path in seen if path != ".gitattributes"]

    def commit(self, name, revision):
        commits = self.repos[name]
        if revision == "main":
            return commits[-1]
        return next((one for one in commits if one[0] == revision), None)

    def add(self, name, lines):
        files = dict(self.repos[name][-1][1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.repos[name].append((_id(f"{name} {len(self.repos[name])} {time.time()}"), files))
        return self.repos[name][-1][0]


def _id(text):
    return hashlib.sha1(text.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; see StandIn."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=None, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, message, code=None):
        more = {"X_Error_Code": code} if code else {}
        self.answer({"error": message}, status, X_Error_Message=message, **more)

    def do_GET(self):
        self.serve(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def serve(self, body):
        url = urlparse(self.path)
        path = unquote(url.path).strip("/")
        self.server.hub.requests.append((self.command, path))
        for part, (status, message) in self.server.hub.failures.items():
            if part in path:
                return self.refuse(status, message)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != TOKEN and token not in self.server.hub.readers:
            return self.refuse(401, "Invalid credentials in Authorization header")
        words = path.split("/")
        if path == "api/repos/create":
            return self.create(json.loads(body), token)
        if words[0] == "api":
            name, rest = "/".join(words[1:4]), words[4:]
        else:
            kind = words.pop(0) if words[0] in ("datasets", "spaces") else "models"
            name, rest = "/".join([kind, *words[:2]]), words[2:]
        if name not in self.server.hub.repos:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        if (self.command == "POST" or rest == ["auth-check", "write"]) and token in self.server.hub.readers:
            return self.refuse(403, "you need write permission")
        return self.repository(name, rest, body, parse_qs(url.query))

    def create(self, wanted, token):
        if token in self.server.hub.readers:
            return self.refuse(403, "you do not have the rights to create a model")
        owner, kind = wanted["organization"] or "me", wanted.get("type") or "model"
        name = f"{kind}s/{owner}/{wanted['name']}"
        known = name in self.server.hub.repos
        if not known:
            self.server.hub.make(name, private=wanted["visibility"] == "private")
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.server.hub.url}/{prefix}{owner}/{wanted['name']}"
        return self.answer({"url": url, "error": "there already"} if known else {"url": url}, 409 if known else 200)

    def repository(self, name, rest, body, query):
        what = rest[0] if rest else ""
        if what == "auth-check":
            return self.answer({})
        if what == "preupload":
            files = json.loads(body)["files"]
            plain = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self.answer({"files": plain})
        if what == "commit":
            self.server.hub.uploading.set()
            self.server.hub.gate.wait(60)
            number = self.server.hub.add(name, [json.loads(line) for line in body.splitlines()])
            return self.answer({"commitUrl": f"{self.server.hub.url}/{name}/commit/{number}", "commitOid": number})
        found = self.server.hub.commit(name, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        number, files = found
        if what in ("", "revision"):
            owner = name.partition("/")[2]
            siblings = [{"rfilename": path} for path in files]
            return self.answer(
                {"id": owner, "sha": number, "private": self.server.hub.private[name], "siblings": siblings}
            )
        if what == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": _blob(data)} for path, data in files.items()
            ]
            return self.answer(listed)
        path = "/".join(rest[2:])
        if path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        return self.answer(files[path], ETag=f'"{_blob(files[path])}"', X_Repo_Commit=number)


def _blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
