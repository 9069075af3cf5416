"""The image and the compose file: right by their linters, and in agreement with the code they are about.

Nothing is built here. What a build would do with the repository is checked against the repository, and the commands
are run as the containers run them, with the settings of the compose file.
"""

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import typer
from ruamel.yaml import YAML

from app.cli import app as commands
from app.settings import Settings, SettingsError, is_loopback
from tests.postgres import PostgresServer
from tests.rules.test_settings import PRODUCTION

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "container"
PROGRAMS = Path(sys.executable).parent
COMPOSE: dict[str, Any] = YAML(typ="safe").load(FOLDER / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OWN = [name for name, service in SERVICES.items() if "build" in service]
_START_SECONDS = 60.0
EVERY_OWN = pytest.mark.parametrize("name", OWN)


class Step(NamedTuple):
    """One instruction of the Containerfile, its lines joined."""

    word: str
    rest: str


def stages() -> list[list[Step]]:
    """The Containerfile's stages, each from its FROM on."""
    text = "\n".join(line for line in (FOLDER / "Containerfile").read_text().splitlines() if not line.startswith("#"))
    found: list[list[Step]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            if word == "FROM":
                found.append([])
            found[-1].append(Step(word, " ".join(rest.split())))
    return found


BUILD, IMAGE = stages()


def only(word: str) -> str:
    """What the image's one instruction of that word says."""
    [rest] = [step.rest for step in IMAGE if step.word == word]
    return rest


def image_environ() -> dict[str, str]:
    return dict(pair.split("=", 1) for step in IMAGE if step.word == "ENV" for pair in shlex.split(step.rest))


def image_settings() -> dict[str, str]:
    return {name: value for name, value in image_environ().items() if name.startswith("SUNSET_")}


def environ(name: str) -> dict[str, str]:
    """The settings of a service: the image's, with the compose file's in front."""
    return {**image_settings(), **SERVICES[name]["environment"]}


# ---------------------------------------------------------------------------------------------------------- linters


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "--failure-threshold", "style", "Containerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ],
    ids=lambda command: str(command[0]),
)
def test_the_linter_finds_nothing(command: list[str]) -> None:
    done = subprocess.run([PROGRAMS / command[0], *command[1:]], cwd=FOLDER, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


# ------------------------------------------------------------------------------------------------------- the image


def test_the_image_builds_on_one_named_python() -> None:
    """The environment is made in one stage and used in the next: the Python must be the same, and no later one."""
    [base] = {step.rest.partition(" AS ")[0] for stage in (BUILD, IMAGE) for step in stage if step.word == "FROM"}
    name, _, tag = base.partition(":")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert name == "python"
    assert re.fullmatch(r"3\.\d+-slim-\w+", tag)
    assert f">={tag.partition('-')[0]}" == wanted


def test_uv_is_the_one_of_the_scripts() -> None:
    [script] = re.findall(r"^uv_version=(\S+)$", (ROOT / "scripts" / "bootstrap.sh").read_text(), re.MULTILINE)
    [image] = re.findall(r"\buv==(\S+)", " ".join(step.rest for step in BUILD))
    assert image == script


def test_what_is_installed_is_the_lock_files_and_nothing_for_development() -> None:
    syncs = [step.rest for step in BUILD if step.word == "RUN" and "uv sync" in step.rest]
    assert len(syncs) == 2
    assert all({"--frozen", "--no-dev"} <= set(command.split()) for command in syncs)
    assert "--no-editable" in syncs[-1].split()  # the source is not in the image


def test_what_is_copied_is_there_and_is_all_that_the_build_is_given() -> None:
    copied = [
        source
        for step in BUILD
        if step.word == "COPY"
        for source in step.rest.split()[:-1]
        if not source.startswith("--from=")
    ]
    ignore = [line for line in (FOLDER / "Containerfile.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert ignore[0] == "*"
    assert sorted(line.removeprefix("!") for line in ignore if line.startswith("!")) == sorted(copied)
    assert [step.rest for step in IMAGE if step.word == "COPY"] == ["--from=build /opt/sunset /opt/sunset"]


def test_the_build_is_given_the_files_that_the_package_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert needed <= {source for step in BUILD if step.word == "COPY" for source in step.rest.split()}


def test_the_process_is_an_unprivileged_user_that_no_host_has_to_know() -> None:
    user, group = only("USER").split(":")
    assert int(user) >= 10_000
    assert int(group) >= 10_000
    after = IMAGE[[step.word for step in IMAGE].index("USER") :]
    assert {step.word for step in after}.isdisjoint({"RUN", "COPY", "ADD"})


def test_the_process_is_started_without_a_shell() -> None:
    """A shell in between would keep the order to stop for itself."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    [program] = json.loads(only("ENTRYPOINT"))
    [command] = json.loads(only("CMD"))
    assert program in scripts
    assert command in cli_commands()
    assert health_check()
    assert only("STOPSIGNAL") == "SIGTERM"


def cli_commands() -> set[str]:
    names: Mapping[str, Any] = getattr(typer.main.get_command(commands), "commands", {})
    return set(names)


def health_check() -> list[str]:
    _, _, command = only("HEALTHCHECK").partition("CMD ")
    parsed: list[str] = json.loads(command)
    return parsed


def test_the_images_settings_are_those_of_a_container() -> None:
    settings = Settings.load({**PRODUCTION, **image_settings()})
    assert not is_loopback(settings.host)
    assert str(settings.port) == only("EXPOSE")


def test_the_image_is_production_unless_told_otherwise() -> None:
    """Who starts it and forgets the environment is told what is missing, and serves nobody as an administrator."""
    with pytest.raises(SettingsError) as refused:
        Settings.load(image_settings())
    missing = {problem.split()[0] for problem in refused.value.problems}
    assert missing == set(PRODUCTION) - {"SUNSET_ENVIRONMENT"}
    with pytest.raises(SettingsError, match="SUNSET_HOST"):
        Settings.load({**image_settings(), "SUNSET_ENVIRONMENT": "development"})


def test_the_data_folder_is_a_volume_of_the_user() -> None:
    """A new volume takes its owner from the image: without one, nothing could be written to it."""
    folder, (user, group) = image_settings()["SUNSET_DATA_DIR"], only("USER").split(":")
    made = " ".join(step.rest for step in IMAGE if step.word == "RUN")
    assert only("VOLUME") == folder
    assert f"install --directory --owner {user} --group {group} --mode 0700 {folder}" in made


# ------------------------------------------------------------------------------------------------- the compose file


def test_the_compose_file_runs_the_image_in_the_processes_that_production_has() -> None:
    assert {name: SERVICES[name]["command"] for name in OWN} == {
        "migrate": ["migrate"],
        "api": ["serve"],
        "worker": ["worker"],
    }
    for name in OWN:
        build = SERVICES[name]["build"]
        assert (FOLDER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]) == FOLDER / "Containerfile"


@EVERY_OWN
def test_the_settings_of_a_service_are_accepted(name: str) -> None:
    settings = Settings.load(environ(name))
    assert settings.environment == "development"
    assert settings.development_on_network
    assert settings.database_url.startswith("postgres://")
    assert settings.worker is (name != "api")  # the worker has a container of its own
    assert bool(settings.worker_port) is (name == "worker")


def test_the_settings_that_processes_share_are_the_same() -> None:
    own = {"SUNSET_WORKER", "SUNSET_WORKER_PORT"}
    [_] = {frozenset((key, value) for key, value in environ(name).items() if key not in own) for name in OWN}
    [_] = {tuple(SERVICES[name]["volumes"]) for name in OWN}
    _, folder = SERVICES["api"]["volumes"][0].split(":")
    assert folder == str(Settings.load(environ("api")).data_dir)


def test_the_database_is_the_one_of_the_compose_file() -> None:
    url = urlsplit(Settings.load(environ("api")).database_url)
    assert url.hostname is not None
    made = SERVICES[url.hostname]["environment"]
    assert (url.username, url.password, url.path) == (
        made["POSTGRES_USER"],
        made["POSTGRES_PASSWORD"],
        f"/{made['POSTGRES_DB']}",
    )
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert SERVICES["migrate"]["depends_on"] == {url.hostname: {"condition": "service_healthy"}}


def test_the_worker_reaches_the_mail_server_on_the_network_that_they_share() -> None:
    """Emails go without TLS to localhost alone; the settings refuse it for any other host."""
    settings = Settings.load(environ("worker"))
    url = urlsplit(settings.smtp_url)
    owner = SERVICES["worker"]["network_mode"].removeprefix("service:")
    assert is_loopback(url.hostname or "")
    assert settings.smtp_starttls == "off"
    assert SERVICES[owner]["environment"]["MP_SMTP_BIND_ADDR"] == f"{url.hostname}:{url.port}"
    assert owner in SERVICES["worker"]["depends_on"]
    assert any(port.endswith(f":{settings.worker_port}") for port in SERVICES[owner]["ports"])
    assert "ports" not in SERVICES["worker"]


def test_links_lead_to_the_port_that_is_published() -> None:
    settings = Settings.load(environ("api"))
    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{urlsplit(settings.public_url).port}:{settings.port}"]


def test_nothing_can_be_reached_from_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@EVERY_OWN
def test_a_container_can_do_little_and_write_nothing_but_its_data(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service  # the image's
    assert "privileged" not in service


@EVERY_OWN
def test_a_container_is_given_the_time_to_stop_that_the_process_takes(name: str) -> None:
    assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > Settings.load(environ(name)).grace_seconds


def test_the_images_of_others_are_named_with_a_version() -> None:
    others = [service["image"] for name, service in SERVICES.items() if name not in OWN]
    assert len(others) == 2
    assert all(re.search(r":v?\d+", image) for image in others)


# -------------------------------------------------------------------------------------------- the commands for real


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def machine(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What is different where a test runs: the database, the folder, and nothing that others can reach."""
    name = asyncio.run(postgres_server.create_empty_database())
    yield {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.defpath}",
        "HOME": str(tmp_path),
        "SUNSET_DATABASE_URL": postgres_server.url(name),
        "SUNSET_HOST": "127.0.0.1",
        "SUNSET_DATA_DIR": str(tmp_path / "data"),
    }
    asyncio.run(postgres_server.drop_database(name))


def run(name: str, machine: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """The container's process."""
    command = [*json.loads(only("ENTRYPOINT")), *SERVICES[name]["command"]]
    return subprocess.Popen(command, cwd=machine["HOME"], env={**environ(name), **machine}, stdout=subprocess.DEVNULL)


def is_healthy(name: str, machine: Mapping[str, str]) -> bool:
    own = SERVICES[name].get("healthcheck", {}).get("test", ["CMD", *health_check()])
    assert own[0] == "CMD"
    return not subprocess.run(own[1:], env={**environ(name), **machine}, capture_output=True, timeout=30).returncode


@pytest.mark.postgres
@pytest.mark.parametrize(("name", "port"), [("api", "SUNSET_PORT"), ("worker", "SUNSET_WORKER_PORT")])
def test_a_container_becomes_healthy_and_stops_when_told(name: str, port: str, machine: dict[str, str]) -> None:
    """The commands, the settings and the health check of the two files, as processes."""
    machine[port] = str(free_port())
    with run("migrate", machine) as migration:
        assert migration.wait(timeout=60) == 0
    assert not is_healthy(name, machine)
    with run(name, machine) as process:
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not is_healthy(name, machine):
                assert process.poll() is None
                assert time.monotonic() < deadline
        finally:
            process.terminate()
            process.wait(timeout=30)
    assert process.returncode == 0
    assert not is_healthy(name, machine)
