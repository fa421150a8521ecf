"""Stores for tests: one of fsspec's memory that notes what is done to it and fails when told, and a web server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class NotedStore(MemoryFileSystem):
    """A store whose files have `tag`s as S3's have ETags, unless `tagged` is taken away.

    Attributes:
        done: (what, name) in order.
        fail: what -> how many calls succeed before the next ones fail.
        sizes: name -> size that is said instead of the true one.
        tagged: whether versions are told.
    """

    protocol = "noted"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the parent
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    done: list[tuple[str, str]] = []  # noqa: RUF012
    fail: dict[str, int] = {}  # noqa: RUF012
    sizes: dict[str, int] = {}  # noqa: RUF012
    tagged = True

    @classmethod
    def forget(cls) -> None:
        for each in (cls.store, cls.done, cls.fail, cls.sizes):
            each.clear()
        cls.pseudo_dirs[:] = [""]
        cls.tagged = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = str(path).partition("://")[2] if "://" in str(path) else str(path)
        path = path.strip("/")
        return "/" + path if path else ""

    def _note(self, what: str, path: str) -> None:
        self.done.append((what, path.rpartition("/")[2]))
        if what in self.fail:
            self.fail[what] -= 1
            if self.fail[what] < 0:
                raise OSError(f"{what} failed as the test wants")

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        told = {key: value for key, value in info.items() if key != "created"}
        if told["type"] == "file":
            name = told["name"].rpartition("/")[2]
            told["size"] = self.sizes.get(name, told["size"])
            if self.tagged:
                told["ETag"] = f"{hash(self.store[told['name']].getvalue()):x}"
        return told

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._told(super().info(path, **kwargs))

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kw: Any
    ) -> Any:
        found = super().find(path, maxdepth, withdirs, detail=True, **kw)
        return {name: self._told(info) for name, info in found.items()} if detail else sorted(found)

    def get_file(self, rpath: str, lpath: str, callback: Any = None, **kwargs: Any) -> None:
        self._note("get", rpath)
        data = self.cat_file(rpath)
        Path(lpath).write_bytes(data)
        for start in range(0, len(data), 1000):
            callback.relative_update(min(1000, len(data) - start))

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **kwargs: Any) -> None:
        self._note("put", rpath)
        super().put_file(lpath, rpath, callback=callback, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._note("mv", path2)
        super().mv(path1, path2, **kwargs)

    def rm_file(self, path: str) -> None:
        self._note("rm", path)
        super().rm_file(path)

    def all(self) -> dict[str, bytes]:
        return {name: file.getvalue() for name, file in sorted(self.store.items())}


class ObjectStore(NotedStore):
    """The same under a protocol whose stores show only whole files."""

    protocol = "r2"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    done: list[tuple[str, str]] = []  # noqa: RUF012
    fail: dict[str, int] = {}  # noqa: RUF012
    sizes: dict[str, int] = {}  # noqa: RUF012


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the first `broken` answers end in the middle of the file."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        """Says nothing."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.got.append(self.path)
        super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        server: Any = self.server
        if server.broken and self.path.endswith(".safetensors"):
            server.broken -= 1
            outputfile.write(source.read(1000))
            self.close_connection = True
            return
        while block := source.read(1 << 16):
            outputfile.write(block)
            server.pause.wait(server.slow)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Last-Modified" and not self.server.dated:  # type: ignore[attr-defined]
            return
        super().send_header(keyword, value)


@contextlib.contextmanager
def web_server(folder: Path, *, dated: bool = True, broken: int = 0, slow: float = 0.0) -> Iterator[Any]:
    """A server of a folder on this machine; `url` is its address, `got` the paths that were asked for."""
    handler = functools.partial(_Handler, directory=str(folder))
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.got, server.broken, server.dated, server.slow = [], broken, dated, slow
    server.pause = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.pause.set()
        server.shutdown()
        server.server_close()
        thread.join()
