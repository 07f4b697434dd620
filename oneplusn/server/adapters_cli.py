"""`oneplusn adapters`: look at adapter files, and manage the adapters of a running server.

Exit codes: 0 done; 1 the server failed or cannot be reached; 2 it refused what was asked; 3 the
adapter or version is not there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tqdm import tqdm

from oneplusn.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_FAULT, EXIT_REFUSED, EXIT_NOT_FOUND = 1, 2, 3
TIMEOUT = httpx.Timeout(600, connect=5)

Printer = Callable[[Any], None]


class _Failed(Exception):
    """What the server answered instead of success, and the exit code that says so."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Action(NamedTuple):
    """One action: its help, its arguments, what it asks of the server, and how that is shown."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[httpx.Client, argparse.Namespace], Any]
    show: Printer


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the actions to the parser of `oneplusn adapters`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    check = actions.add_parser("check", help="read an adapter without a server, and describe it")
    check.add_argument("path", type=Path, help="Folder or archive.")
    check.add_argument("--name", help="Name it would get; the folder's otherwise.")
    for name, action in ACTIONS.items():
        sub = actions.add_parser(name, help=action.help, description=action.help)
        sub.add_argument(
            "--url",
            default=os.environ.get("ONEPLUSN_URL", DEFAULT_URL),
            help=f"Address of the server, or ONEPLUSN_URL. Default: {DEFAULT_URL}.",
        )
        sub.add_argument(
            "--api-key",
            default=os.environ.get("ONEPLUSN_API_KEY"),
            help="Its key; better in ONEPLUSN_API_KEY, where no list of processes shows it.",
        )
        sub.add_argument("--json", action="store_true", help="Print the server's answer.")
        action.declare(sub)


def run(args: argparse.Namespace) -> int:
    """Do what `declare` described; return the exit code."""
    if args.action == "check":
        return _check(args)
    action = ACTIONS[args.action]
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    try:
        with httpx.Client(base_url=args.url, headers=headers, timeout=TIMEOUT) as client:
            answer = action.run(client, args)
    except _Failed as error:
        print(f"oneplusn: {error}", file=sys.stderr)
        return error.code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"oneplusn: {args.url} cannot be reached: {error}", file=sys.stderr)
        return EXIT_FAULT
    (_print_json if args.json else action.show)(answer)
    return 0


def publisher(url: str, api_key: str | None) -> Callable[[Path, str], str]:
    """Make what sends an adapter's folder to a server under a name, and returns its label.

    What that raises is a ConfigError, with what the server said.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def publish(folder: Path, name: str) -> str:
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT) as client:
                answer = _send(client, folder, {"name": name}, {}, hide=False)
        except _Failed as error:
            msg = f"{url} refused {name!r}: {error}; the bundle stays in {folder}"
            raise ConfigError(msg) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            msg = f"{url} cannot be reached: {error}; the bundle stays in {folder}"
            raise ConfigError(msg) from error
        label: str = answer["id"]
        return label

    return publish


def _ask(client: httpx.Client, method: str, path: str, **how: Any) -> Any:  # noqa: ANN401  (JSON)
    return _checked(client.request(method, path, **how)).json()


def _checked(answer: httpx.Response) -> httpx.Response:
    """Return an answer that is no error.

    Raises:
        _Failed: It is one.
    """
    if answer.is_success:
        return answer
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{answer.status_code} {answer.reason_phrase}: {answer.text[:200]}"
    fault = EXIT_FAULT if answer.is_server_error else EXIT_REFUSED
    raise _Failed(message, EXIT_NOT_FOUND if answer.status_code == 404 else fault)


class _Counted(io.BufferedReader):
    """A file that moves a progress bar as it is read."""

    def __init__(self, path: Path, bar: tqdm[Any]) -> None:
        super().__init__(io.FileIO(path))
        self._bar = bar

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and say how much."""
        data = super().read(size)
        self._bar.update(len(data))
        return data


def _upload(client: httpx.Client, args: argparse.Namespace) -> Any:  # noqa: ANN401  (JSON)
    path: Path = args.path
    name = args.name or path.resolve().name.partition(".")[0].lower()
    switches = {"dry_run": args.dry_run, "activate": not args.no_activate, "strict": not args.lax}
    fields = {"name": name, **{key: str(value).lower() for key, value in switches.items()}}
    headers = {} if args.if_match is None else {"if-match": args.if_match}
    return _send(client, path, fields, headers, hide=args.json)


def _send(
    client: httpx.Client,
    path: Path,
    fields: Mapping[str, str],
    headers: Mapping[str, str],
    *,
    hide: bool,
) -> Any:  # noqa: ANN401  (JSON)
    """Upload a folder or an archive, with a bar; return the server's answer."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        msg = f"{path} has no files to upload; give the adapter's folder, or an archive of it"
        raise ConfigError(msg)
    total = sum(file.stat().st_size for file in files)
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(fields["name"], total, hide=hide))
        parts = [("files", (file.name, stack.enter_context(_Counted(file, bar)))) for file in files]
        answer = client.post("/v1/adapters", data=fields, files=parts, headers=headers)
    return _checked(answer).json()


def _download(client: httpx.Client, args: argparse.Namespace) -> Any:  # noqa: ANN401  (JSON)
    params = {} if args.version is None else {"version": args.version}
    with client.stream("GET", f"/v1/adapters/{args.name}/download", params=params) as answer:
        if not answer.is_success:
            answer.read()
        label = _checked(answer).headers["x-oneplusn-adapter"]
        target: Path = args.out or Path(f"{label.replace('@', '-')}.tar")
        partial = target.with_name(f".{target.name}.part")
        total = int(answer.headers["content-length"])
        try:
            with partial.open("wb") as file, _progress(label, total, hide=args.json) as bar:
                for chunk in answer.iter_bytes():
                    bar.update(file.write(chunk))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return {"id": label, "file": str(target), "bytes": total}


@contextmanager
def _progress(what: str, total: int, *, hide: bool) -> Iterator[tqdm[Any]]:
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hide or None) as bar:
        yield bar


def _check(args: argparse.Namespace) -> int:
    from oneplusn.adapters.files import read_adapter
    from oneplusn.server.targets import check_defaults

    path: Path = args.path
    bundle = read_adapter(path, name=args.name or path.resolve().name.partition(".")[0].lower())
    check_defaults(bundle.defaults)
    layout = bundle.runs()
    print(f"digest   {bundle.digest}")
    print(f"method   {bundle.method}")
    print(f"base     {bundle.base or 'not said'}")
    print(f"tasks    {', '.join(bundle.tasks)}")
    print(f"modules  {len(bundle.modules)}")
    print(f"experts  {len(bundle.experts)}, of which {len(layout.common)} serve several tasks")
    for expert in bundle.experts:
        whose = f"of {expert.owner}" if expert.owner else "common"
        print(f"         {expert.name}: rank {expert.rank}, {whose}")
    return 0


def _declare_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="Name of the adapter.")


def _declare_nothing(_parser: argparse.ArgumentParser) -> None:
    pass


def _declare_upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="Folder, or a .tar, .tar.gz or .zip.")
    parser.add_argument("--name", help="Name it gets; the folder's otherwise.")
    parser.add_argument("--dry-run", action="store_true", help="Report, and keep nothing.")
    parser.add_argument("--no-activate", action="store_true", help="Keep it, and serve it later.")
    parser.add_argument("--lax", action="store_true", help="Accept modules the base lacks.")
    parser.add_argument("--if-match", help="Refuse unless the adapter has this generation.")


def _declare_download(parser: argparse.ArgumentParser) -> None:
    _declare_name(parser)
    parser.add_argument("--version", type=int, help="Default: the active one.")
    parser.add_argument("--out", type=Path, help="File to write. Default: NAME-VERSION.tar.")


def _declare_version(parser: argparse.ArgumentParser) -> None:
    _declare_name(parser)
    parser.add_argument("version", type=int, help="Number of the version.")


def _declare_delete(parser: argparse.ArgumentParser) -> None:
    _declare_name(parser)
    parser.add_argument("--version", type=int, help="Default: the adapter with all of them.")


def _declare_pin(parser: argparse.ArgumentParser) -> None:
    _declare_name(parser)
    parser.add_argument("--off", action="store_true", help="Let it leave memory again.")


def _list(client: httpx.Client, _args: argparse.Namespace) -> Any:  # noqa: ANN401  (JSON)
    found: list[Any] = []
    more = True
    while more:
        after = found[-1]["name"] if found else ""
        page = _ask(client, "GET", "/v1/adapters", params={"after": after})
        found += page["data"]
        more = page["has_more"]
    return {"object": "list", "data": found}


def _path(args: argparse.Namespace, action: str = "") -> str:
    return f"/v1/adapters/{args.name}{action}"


def _delete(client: httpx.Client, args: argparse.Namespace) -> Any:  # noqa: ANN401  (JSON)
    params = {} if args.version is None else {"version": args.version}
    return _ask(client, "DELETE", _path(args), params=params)


def _print_json(answer: Any) -> None:  # noqa: ANN401  (JSON)
    print(json.dumps(answer, indent=2))


def _print_one(answer: Mapping[str, Any]) -> None:
    for key in ("id", "state", "digest", "method", "rank", "bytes", "resident", "pinned", "file"):
        if key in answer:
            print(f"{key:<10} {answer[key]}")
    if "tasks" in answer:
        print(f"{'tasks':<10} {', '.join(answer['tasks'])}")
    for warning in answer.get("report", {}).get("warnings", ()):
        print(f"{'warning':<10} {warning}")


def _print_report(answer: Mapping[str, Any]) -> None:
    _print_one(answer)
    report = answer["report"]
    for key in ("matched", "unmatched", "missing"):
        print(f"{key:<10} {len(report[key])} modules")
    for module in report["unmatched"]:
        print(f"{'':<10} {module} is not in the base")
    print(f"{'pages':<10} {report['num_bytes']} bytes")


def _print_table(answer: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    rows = [("ADAPTER", "STATE", "METHOD", "BYTES", "TASKS")]
    rows += [
        (e["id"], e["state"], e["method"], str(e["bytes"]), ", ".join(e["tasks"]))
        for e in answer["data"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4]]))


def _print_deleted(answer: Mapping[str, Sequence[str]]) -> None:
    for label in answer["deleted"]:
        print(f"deleted    {label}")


ACTIONS: dict[str, _Action] = {
    "upload": _Action("send an adapter and serve it", _declare_upload, _upload, _print_report),
    "download": _Action("fetch an adapter's files", _declare_download, _download, _print_one),
    "list": _Action("list the adapters", _declare_nothing, _list, _print_table),
    "show": _Action(
        "show one adapter", _declare_name, lambda c, a: _ask(c, "GET", _path(a)), _print_one
    ),
    "versions": _Action(
        "list an adapter's versions",
        _declare_name,
        lambda c, a: _ask(c, "GET", _path(a, "/versions")),
        _print_table,
    ),
    "activate": _Action(
        "let the adapter's tasks mean one of its versions",
        _declare_version,
        lambda c, a: _ask(c, "PUT", _path(a), json={"version": a.version}),
        _print_one,
    ),
    "rollback": _Action(
        "go back to the version before",
        _declare_name,
        lambda c, a: _ask(c, "POST", _path(a, ":rollback")),
        _print_one,
    ),
    "pin": _Action(
        "keep an adapter in memory",
        _declare_pin,
        lambda c, a: _ask(c, "POST", _path(a, ":pin"), params={"pinned": not a.off}),
        _print_one,
    ),
    "delete": _Action("forget an adapter or a version", _declare_delete, _delete, _print_deleted),
}
