"""A server that speaks as much of Google Cloud Storage's JSON interface as gcsfs and TensorStore use; objects are kept in memory."""

from __future__ import annotations

import email
import json
import re
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, tuple[bytes, int]]] = {}
    """Content and generation by BUCKET/NAME."""
    uploads: ClassVar[dict[str, tuple[str, bytes]]] = {}
    generation: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        if isinstance(body, dict):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _about(self, key: str) -> dict:
        bucket, _, name = key.partition("/")
        data, generation = self.objects[key]
        time = "2026-01-01T00:00:00.000Z"
        about = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "generation": str(generation)}
        return about | {
            "id": f"{key}/{generation}",
            "metageneration": "1",
            "updated": time,
            "timeCreated": time,
            "storageClass": "STANDARD",
        }

    def _put(self, key: str, data: bytes, query: dict[str, str]) -> None:
        with self.lock:
            now = self.objects[key][1] if key in self.objects else 0
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
                return self._reply(412, {"error": {"code": 412, "message": "precondition"}})
            Handler.generation += 1
            self.objects[key] = (data, Handler.generation)
        self._reply(200, self._about(key))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.objects):
            name = key.removeprefix(f"{bucket}/")
            if not key.startswith(f"{bucket}/{prefix}"):
                continue
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._about(key))
        self._reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path
        if path.startswith("/batch/"):
            return self._batch(body)
        self._route(self.command, path, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def _batch(self, body: bytes) -> None:
        parts = re.findall(rb"(?:Content-ID: *([^\r\n]*))?[^\n]*\r?\n(?:[^\n]+\r?\n)*\r?\nDELETE ([^ ]+) HTTP", body)
        answers = []
        for identity, target in parts:
            bucket, name = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/?]+).*", target.decode()).groups()
            found = self.objects.pop(f"{bucket}/{urllib.parse.unquote(name)}", None)
            status = "204 No Content" if found else "404 Not Found"
            head = f"--x\r\nContent-Type: application/http\r\nContent-ID: response-{identity.decode()}\r\n\r\n"
            answers.append(f"{head}HTTP/1.1 {status}\r\n\r\n")
        self._reply(200, ("\r\n".join(answers) + "--x--").encode(), Content_Type="multipart/mixed; boundary=x")

    def _route(self, method: str, path: str, query: dict[str, str], body: bytes) -> None:
        unquote = urllib.parse.unquote
        if found := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
            return self._upload(found[1], query, body)
        if found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
            key = f"{found[1]}/{unquote(found[2])}"
            if key not in self.objects:
                return self._reply(404, {"error": {"code": 404, "message": "not found"}})
            if method == "DELETE":
                del self.objects[key]
                return self._reply(204)
            if query.get("alt") != "media":
                return self._reply(200, self._about(key))
            data, generation = self.objects[key]
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._reply(304)
            headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                begin, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
                if begin >= len(data):
                    return self._reply(416)
                headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
                return self._reply(206, data[begin : end + 1], **headers)
            return self._reply(200, data, **headers)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            source, target = f"{found[1]}/{unquote(found[2])}", f"{found[1]}/{unquote(found[3])}"
            with self.lock:
                if source not in self.objects:
                    return self._reply(404, {"error": {"code": 404, "message": "not found"}})
                self.objects[target] = self.objects.pop(source)
            return self._reply(200, self._about(target))
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path):
            source, target = f"{found[1]}/{unquote(found[2])}", f"{found[3]}/{unquote(found[4])}"
            if source not in self.objects:
                return self._reply(404, {"error": {"code": 404, "message": "not found"}})
            Handler.generation += 1
            self.objects[target] = (self.objects[source][0], Handler.generation)
            return self._reply(200, {"kind": "storage#rewriteResponse", "done": True, "resource": self._about(target)})
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return self._list(found[1], query)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return self._reply(200, {"kind": "storage#bucket", "name": found[1], "id": found[1]})
        self._reply(404, {"error": {"code": 404, "message": f"{method} {path} is unknown here"}})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if kind == "media":
            self._put(f"{bucket}/{query['name']}", body, query)
        elif kind == "multipart":
            message = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body)
            about, data = message.get_payload()
            self._put(f"{bucket}/{json.loads(about.get_payload(decode=True))['name']}", data.get_payload(decode=True), query)
        elif "upload_id" not in query:
            identity = str(len(self.uploads))
            self.uploads[identity] = (f"{bucket}/{query.get('name') or json.loads(body)['name']}", b"")
            host = f"http://{self.headers['Host']}"
            self._reply(200, Location=f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={identity}")
        else:
            key, before = self.uploads[query["upload_id"]]
            self.uploads[query["upload_id"]] = (key, before + body)
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self._reply(308, Range=f"bytes=0-{len(before + body) - 1}")
            self._put(key, before + body, {})


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients drop connections when it suits them
            super().handle_error(*_)


def serve() -> tuple[ThreadingHTTPServer, str]:
    """A running server and its address; `shutdown` and `server_close` end it."""
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
