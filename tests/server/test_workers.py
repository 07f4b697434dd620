"""Workers: what they make, what they refuse, and that no job outlives its limits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from bundles import small_bundle
from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.files import write_bundle
from oneplusn.adapters.image_file import check_image
from oneplusn.adapters.prepared import BaseLayout, Prepared
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterInvalid,
    AdapterMediaType,
    AdapterTooLarge,
    InvalidRequest,
    QueueFull,
    WorkerFailed,
)
from oneplusn.server import jobs
from oneplusn.server.grammars import Grammars, GrammarSpec
from oneplusn.server.jobs import MIB, Job
from oneplusn.server.workers import Workers
from prepared_bundles import base_for, prepared
from serving import wait_until

pytestmark = pytest.mark.anyio

LETTERS = small_bundle(tasks=("vowels", "upper"))
BASE = base_for(LETTERS)

FRAGILE_JOB = '''
"""A job that breaks its process as often as the upload says."""
import os
from pathlib import Path
from oneplusn.errors import AdapterMediaType
from oneplusn.server.jobs.prepare import Request

NEEDS = ()

def run(request):
    Path(request.out, "half").write_text("")
    Path(request.out, "archive").mkdir()
    left = Path(request.source)
    count = int(left.read_text())
    left.write_text(str(count - 1))
    if count:
        os.abort()
    raise AdapterMediaType("it was read")
'''

ODD_JOB = '''
"""A job that misbehaves as it is told."""
import mmap, os, sys, time
import msgspec

NEEDS = ("json",)
SECONDS, MEMORY_BYTES = 1.0, 64 << 20

class Request(msgspec.Struct):
    what: str

class Result(msgspec.Struct):
    value: str

def warm(request):
    if request.what == "cold":
        raise OSError("secret")

def run(request):
    match request.what:
        case "sleep": time.sleep(60)
        case "slow": time.sleep(0.3)
        case "spin":
            while True: pass
        case "eat":
            hoard = [bytearray(1 << 20) for _ in range(10_000)]
        case "map": mmap.mmap(-1, 1 << 30)
        case "crash": os.kill(os.getpid(), 11)
        case "fault": raise ZeroDivisionError("secret")
        case "print": print("noise"); os.write(1, b"noise")
        case "fill":
            with open("fill", "wb") as file: file.truncate(1 << 40)
        case "env": return Result(",".join(sorted(os.environ)))
        case "loaded": return Result(str("json" in sys.modules))
        case "pid": return Result(str(os.getpid()))
    return Result(request.what)
'''


class Request(msgspec.Struct):
    what: str


class Result(msgspec.Struct):
    value: str


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Workers]:
    """One warm worker for the tests that leave it alive; it costs seconds."""
    made = Workers()
    made.start()
    yield made
    await made.close()


@pytest.fixture
async def odd(tmp_path, monkeypatch) -> AsyncIterator[Workers]:
    """Workers with a lane of their own, whose jobs misbehave; no torch in it."""
    (tmp_path / "odd_job.py").write_text(ODD_JOB)
    # The child reads the same table.
    (tmp_path / "fragile_job.py").write_text(FRAGILE_JOB)
    (tmp_path / "sitecustomize.py").write_text(
        "from oneplusn.server.jobs import JOBS, Job\n"
        "JOBS['odd'] = Job('odd_job', 'odd', 1.0, 64 << 20)\n"
        "JOBS['prepare'] = Job('fragile_job', 'odd', 60.0, 64 << 20)\n"
    )
    monkeypatch.setitem(jobs.JOBS, "odd", Job("odd_job", "odd", 1.0, 64 * MIB))
    monkeypatch.setitem(jobs.JOBS, "prepare", Job("fragile_job", "odd", 60.0, 64 * MIB))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("ONEPLUSN_API_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    made = Workers(limit=2)
    yield made
    await made.close()


async def ask(made: Workers, what: str) -> str:
    return (await made.run("odd", Request(what), Result)).value


@pytest.fixture
def source(tmp_path) -> Path:
    write_bundle(LETTERS, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


class TestPrepare:
    async def test_it_is_what_this_process_would_make(self, shared, source, out, tmp_path) -> None:
        expected, expected_out = prepared(LETTERS, "letters", tmp_path)

        made = await shared.prepare(source, out, name="letters", base=BASE)

        assert made == expected
        assert {path.name for path in out.iterdir()} == {
            "adapter_model.safetensors",
            "bundle.json",
            "image.bin",
        }
        for path in out.iterdir():
            assert path.read_bytes() == (expected_out / path.name).read_bytes()

    async def test_files_have_the_names_that_the_client_gave(
        self, shared, source, out, tmp_path
    ) -> None:
        files = {}
        for number, path in enumerate(source.iterdir()):
            files[path.name] = path.rename(tmp_path / str(number))
        made = await shared.prepare(files, out, name="letters", base=BASE)
        assert made.digest == LETTERS.digest

    async def test_a_dry_run_leaves_nothing(self, shared, source, out) -> None:
        made = await shared.prepare(source, out, name="letters", base=BASE, dry_run=True)
        assert (made.digest, made.files) == (LETTERS.digest, [])
        assert list(out.iterdir()) == []

    async def test_what_is_wrong_is_told_with_code_and_status(self, shared, source, out) -> None:
        (source / "bundle.json").write_text("{}")
        with pytest.raises(AdapterInvalid) as caught:
            await shared.prepare(source, out, name="letters", base=BASE)
        assert (caught.value.code, caught.value.status_code) == ("json_invalid", 422)
        assert "bundle.json" in caught.value.message

    async def test_a_pickle_is_never_opened(self, shared, out, tmp_path) -> None:
        marker = tmp_path / "opened"
        content = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
        (tmp_path / "0").write_bytes(content)
        with pytest.raises(AdapterMediaType):
            await shared.prepare(
                {"adapter_model.bin": tmp_path / "0"}, out, name="letters", base=BASE
            )
        assert not marker.exists()

    @pytest.mark.parametrize("limit", ["_max_image_bytes", "_max_upload_bytes"])
    async def test_the_limits_of_the_server_hold(
        self, shared, source, out, monkeypatch, limit
    ) -> None:
        files = {path.name: path for path in source.iterdir()}
        monkeypatch.setattr(shared, limit, 100)
        with pytest.raises(AdapterTooLarge, match="100"):
            await shared.prepare(files, out, name="letters", base=BASE)


class TestBrokenReaders:
    """An upload is to blame for breaking a process once it has broken a second one."""

    async def test_what_broke_once_is_read_by_the_next_process(self, odd, out, tmp_path) -> None:
        (tmp_path / "upload").write_text("1")
        with pytest.raises(AdapterMediaType, match="it was read"):
            await odd.prepare(tmp_path / "upload", out, name="letters", base=BASE)

    async def test_what_breaks_every_process_is_refused_by_name(self, odd, out, tmp_path) -> None:
        (tmp_path / "upload").write_text("99")
        with pytest.raises(AdapterInvalid, match="'letters' breaks") as caught:
            await odd.prepare(tmp_path / "upload", out, name="letters", base=BASE)
        assert (caught.value.status_code, caught.value.code) == (422, "adapter_breaks_reader")
        assert (tmp_path / "upload").read_text() == "97"
        assert list(out.iterdir()) == []
        assert await ask(odd, "hello") == "hello"


class TestImages:
    async def test_one_that_is_missing_or_damaged_is_made_again(
        self, shared, source, tmp_path
    ) -> None:
        image = tmp_path / "a.img"
        for spoil in (lambda: None, lambda: image.write_bytes(b"x"), lambda: flip_last(image)):
            spoil()
            await shared.ensure_image(LETTERS.digest, source, image, BASE)
            check_image(image, LETTERS.digest)

    async def test_one_that_is_whole_is_left_alone(self, source, tmp_path) -> None:
        image = tmp_path / "a.img"
        _, out = prepared(LETTERS, "letters", tmp_path)
        (out / "image.bin").rename(image)
        before = image.stat()
        unused = Workers()
        assert await unused.ensure_image(LETTERS.digest, source, image, BASE) == image
        assert image.stat() == before

    async def test_a_blob_with_other_content_is_corrupt(self, shared, source, tmp_path) -> None:
        other = small_bundle(tasks=("vowels", "upper"), seed=1).digest
        with pytest.raises(AdapterCorrupt):
            await shared.rebuild(other, source, tmp_path / "a.img", BASE)


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class TestLimits:
    @pytest.mark.parametrize(
        ("what", "code", "says"),
        [
            ("sleep", "worker_timeout", "more than 1 s"),
            ("spin", "worker_timeout", "more than 1 s"),
            ("eat", "worker_memory", "more than 64 MiB of memory"),
            ("map", "worker_memory", "more than 64 MiB of memory"),
            ("fill", "worker_memory", "or a file of that size"),
            ("crash", "worker_crashed", "has been replaced"),
            ("fault", "worker_failed", "ZeroDivisionError"),
            ("cold", "worker_unavailable", "could not be loaded"),
        ],
    )
    async def test_a_job_that_goes_too_far_fails_and_the_next_one_is_served(
        self, odd, what, code, says
    ) -> None:
        with pytest.raises(WorkerFailed, match=says) as caught:
            await ask(odd, what)
        assert caught.value.code == code
        assert "secret" not in caught.value.message
        assert await ask(odd, "hello") == "hello"

    async def test_a_fault_of_a_job_costs_no_process(self, odd) -> None:
        before = await ask(odd, "pid")
        with pytest.raises(WorkerFailed):
            await ask(odd, "fault")
        assert await ask(odd, "pid") == before

    async def test_too_much_memory_for_an_adapter_makes_it_too_large(
        self, source, out, monkeypatch
    ) -> None:
        async def fail(*_: object) -> Prepared:
            raise WorkerFailed("it takes more than 1 MiB", code="worker_memory")

        starved = Workers()
        monkeypatch.setattr(starved, "run", fail)
        with pytest.raises(AdapterTooLarge, match="more than 1 MiB") as caught:
            await starved.prepare(source, out, name="letters", base=BASE)
        assert caught.value.status_code == 413

    async def test_jobs_beyond_the_limit_are_refused(self, odd) -> None:
        await ask(odd, "hello")
        running = [asyncio.create_task(ask(odd, "pid")) for _ in range(2)]
        await asyncio.sleep(0)  # let both take their places
        with pytest.raises(QueueFull) as caught:
            await ask(odd, "hello")
        assert caught.value.status_code == 429
        assert len(set(await asyncio.gather(*running))) == 1
        assert await ask(odd, "hello") == "hello"


class TestProcess:
    async def test_what_a_job_prints_is_no_reply(self, odd, capfd) -> None:
        assert await ask(odd, "print") == "print"
        assert "noise" in capfd.readouterr().err

    async def test_it_knows_none_of_our_settings(self, odd) -> None:
        names = (await ask(odd, "env")).split(",")
        assert "OMP_NUM_THREADS" in names
        assert not [name for name in names if name.startswith("ONEPLUSN_")]

    async def test_what_a_job_needs_is_there_before_it(self, odd) -> None:
        assert await ask(odd, "loaded") == "True"

    async def test_one_that_dies_between_jobs_is_replaced(self, odd) -> None:
        pid = int(await ask(odd, "pid"))
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert int(await ask(odd, "pid")) != pid

    async def test_one_that_nobody_needs_ends_and_the_next_job_has_another(
        self, odd, monkeypatch
    ) -> None:
        monkeypatch.setattr(odd, "_idle_seconds", 0.05)
        first = int(await ask(odd, "pid"))
        await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{first}").exists())
        assert int(await ask(odd, "pid")) != first

    async def test_it_is_not_ended_in_a_job_that_takes_longer(self, odd, monkeypatch) -> None:
        monkeypatch.setattr(odd, "_idle_seconds", 0.05)
        assert await ask(odd, "slow") == "slow"

    async def test_a_caller_that_goes_away_does_not_disturb_the_next(self, odd) -> None:
        await ask(odd, "hello")
        gone = asyncio.create_task(ask(odd, "pid"))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await ask(odd, "hello") == "hello"

    async def test_closing_ends_it_in_the_middle_of_a_job(self, odd) -> None:
        pid = int(await ask(odd, "pid"))
        running = asyncio.create_task(ask(odd, "sleep"))
        await asyncio.sleep(0)
        await odd.close()
        with pytest.raises(WorkerFailed) as caught:
            await running
        assert caught.value.code == "draining"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    async def test_one_that_cannot_start_is_told_as_such(self, odd, tmp_path) -> None:
        (tmp_path / "odd_job.py").write_text("raise SystemExit(3)")
        with pytest.raises(WorkerFailed, match="could not be started") as caught:
            await ask(odd, "hello")
        assert (caught.value.status_code, caught.value.code) == (503, "worker_unavailable")
        (tmp_path / "odd_job.py").write_text(ODD_JOB)
        assert await ask(odd, "hello") == "hello"

    async def test_so_is_one_that_the_system_has_no_room_for(self, odd, monkeypatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refuse)
            with pytest.raises(WorkerFailed) as caught:
                await ask(odd, "hello")
        assert caught.value.code == "worker_unavailable"
        assert "Resource temporarily unavailable" in caught.value.message
        assert await ask(odd, "hello") == "hello"


class TestGrammars:
    """A grammar is to blame for what becomes of the process in its own job, and for no more."""

    @pytest.mark.parametrize(
        ("what", "says"),
        [
            ("crash", "broke the process"),
            ("fault", "broke the process"),
            ("eat", "more than 1 s or 256 MiB"),
            ("sleep", "more than 1 s or 256 MiB"),
        ],
    )
    async def test_what_it_breaks_is_its_fault(self, odd, what, says) -> None:
        proofs = Grammars(lambda spec: ask(odd, spec.text))
        with pytest.raises(InvalidRequest, match=says) as caught:
            await proofs.prove(GrammarSpec("ebnf", what, param="p"))
        error = caught.value
        assert (error.status_code, error.code, error.param) == (400, "grammar_too_complex", "p")
        assert await proofs.prove(GrammarSpec("ebnf", "hello"))

    @pytest.mark.parametrize("content", ["raise SystemExit(3)", None])
    async def test_a_process_that_cannot_work_is_not(self, odd, tmp_path, content) -> None:
        proofs = Grammars(lambda spec: ask(odd, spec.text))
        spec = GrammarSpec("ebnf", "hello" if content else "cold")
        (tmp_path / "odd_job.py").write_text(content or ODD_JOB)
        with pytest.raises(WorkerFailed) as caught:
            await proofs.prove(spec)
        assert (caught.value.status_code, caught.value.code) == (503, "worker_unavailable")
        (tmp_path / "odd_job.py").write_text(ODD_JOB.replace('"cold"', '"cold once"'))
        assert await proofs.prove(spec) == spec.encode()


async def test_one_bundle_after_another_in_one_process(shared, tmp_path) -> None:
    """As an engine sees it when eight adapters are uploaded at once."""
    bundles = [small_bundle(tasks=(f"t{seed}",), seed=seed) for seed in range(4)]
    base: BaseLayout = base_for(*bundles)

    async def one(number: int, bundle: Bundle) -> Prepared:
        folder = tmp_path / str(number)
        write_bundle(bundle, folder / "source")
        (folder / "out").mkdir()
        return await shared.prepare(folder / "source", folder / "out", name="a", base=base)

    made = await asyncio.gather(*(one(*pair) for pair in enumerate(bundles)))
    assert [each.digest for each in made] == [bundle.digest for bundle in bundles]


def test_a_worker_ends_with_its_parent() -> None:
    """The parent's end of the pipe closes, whatever ends the parent."""
    command = [sys.executable, "-P", "-m", "oneplusn.server.worker", "none"]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, b"\x04\0\0\0warm"), done.stderr


def test_every_job_is_a_module_that_the_api_can_load() -> None:
    code = (
        "import sys; from importlib import import_module; from oneplusn.server.jobs import JOBS;"
        "modules = [import_module(job.module) for job in JOBS.values()];"
        "assert all(hasattr(m, n) for m in modules for n in ('NEEDS', 'Request', 'run'));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
