"""What the operator may set, how mistakes are told, and what is refused in production."""

import multiprocessing
import stat
from pathlib import Path

import pytest

from app.settings import Documentation, Settings, SettingsError, is_loopback

SECRET = "1f0c5b7a9d3e8264" * 4
PRODUCTION = {
    "SUNSET_ENVIRONMENT": "production",
    "SUNSET_PUBLIC_URL": "https://cancel.example.com",
    "SUNSET_SECRET_KEY": SECRET,
    "SUNSET_OIDC_ISSUER": "https://id.example.com/",
    "SUNSET_OIDC_AUDIENCE": "sunset-api",
    "SUNSET_SMTP_URL": "smtp://sunset:hunter2@mail.example.com:587",
}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ)
    return caught.value.problems


def test_nothing_needs_to_be_set_in_development() -> None:
    """An empty environment is a working development installation on this machine alone."""
    settings = Settings.load({})

    assert settings.environment == "development"
    assert is_loopback(settings.host)
    assert settings.data_dir == Path("var").absolute()
    assert settings.database_url == f"sqlite://{settings.data_dir}/sunset.db"
    assert settings.public_url == "http://127.0.0.1:8000"
    assert (settings.development_issuer, settings.graphiql, settings.mailbox, settings.demo) == (True, True, True, True)
    assert settings.worker
    assert {source for _, _, source in settings.describe()} == {"default"}


def test_production_is_closed_by_default() -> None:
    """What is convenient in development is off in production without being named."""
    settings = Settings.load(PRODUCTION)

    assert (settings.development_issuer, settings.graphiql, settings.mailbox, settings.demo) == (False,) * 4
    assert settings.smtp_starttls == "required"
    assert settings.mail_from == "Sunset <no-reply@cancel.example.com>"
    assert settings.database_url.startswith("sqlite://"), "SQLite is allowed in production"


@pytest.mark.parametrize("name", sorted(set(PRODUCTION) - {"SUNSET_ENVIRONMENT"}))
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "absent"])
def test_production_names_what_is_missing(name: str, empty: bool) -> None:
    """Each thing that production cannot do without is named when it is absent, and when it is there and empty."""
    environ = {variable: value for variable, value in PRODUCTION.items() if variable != name}
    if empty:
        environ[name] = "  "

    assert any(problem.startswith(f"{name} is required") for problem in problems(environ))


@pytest.mark.parametrize("name", ["DEVELOPMENT_ISSUER", "MAILBOX", "DEMO", "DEVELOPMENT_ON_NETWORK"])
def test_production_refuses_what_is_for_development(name: str) -> None:
    [problem] = problems({**PRODUCTION, f"SUNSET_{name}": "true"})

    assert problem.startswith(f"SUNSET_{name} must be false in production")


FORGOTTEN = [
    ("HOST", "0.0.0.0"),  # noqa: S104
    ("HOST", "::"),
    ("HOST", "10.0.0.5"),
    ("HOST", "cancel.internal"),
    ("PUBLIC_URL", "https://cancel.example.com"),
    ("OIDC_ISSUER", "https://id.example.com/"),
    ("OIDC_ISSUER", "http://localhost:8080/realms/sunset"),
]
"""What a server has, and a developer's machine has not."""


@pytest.mark.parametrize(("name", "value"), FORGOTTEN)
@pytest.mark.parametrize("environment", [None, "development"])
def test_an_environment_that_looks_forgotten_is_refused(name: str, value: str, environment: str | None) -> None:
    """Development lets everybody be anyone: it is not what a server does that others can reach, unless that is said."""
    environ = {f"SUNSET_{name}": value} | ({} if environment is None else {"SUNSET_ENVIRONMENT": environment})
    if name == "OIDC_ISSUER":
        environ["SUNSET_OIDC_AUDIENCE"] = "sunset"

    [problem] = problems(environ)

    assert problem.startswith(f"SUNSET_{name} is {value}")
    assert "SUNSET_ENVIRONMENT=production" in problem
    assert "SUNSET_DEVELOPMENT_ON_NETWORK=true" in problem
    assert Settings.load({**environ, "SUNSET_DEVELOPMENT_ON_NETWORK": "true"}).environment == "development"


def test_each_sign_of_a_forgotten_environment_is_told() -> None:
    found = problems(
        {
            "SUNSET_HOST": "0.0.0.0",  # noqa: S104
            "SUNSET_PUBLIC_URL": "https://cancel.example.com",
            "SUNSET_OIDC_ISSUER": "https://id.example.com/",
            "SUNSET_OIDC_AUDIENCE": "sunset",
        }
    )

    assert [problem.split()[0] for problem in found] == ["SUNSET_HOST", "SUNSET_PUBLIC_URL", "SUNSET_OIDC_ISSUER"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOST", "localhost"),
        ("HOST", "127.0.0.2"),
        ("HOST", "::1"),
        ("PUBLIC_URL", "https://localhost:8443"),
        ("PUBLIC_URL", "https://[::1]"),
        ("PUBLIC_URL", "http://sunset.test"),
    ],
)
def test_a_developers_machine_needs_no_permission(name: str, value: str) -> None:
    assert not Settings.load({f"SUNSET_{name}": value}).development_on_network


def test_a_bad_permission_is_one_problem() -> None:
    [problem] = problems({"SUNSET_HOST": "0.0.0.0", "SUNSET_DEVELOPMENT_ON_NETWORK": "perhaps"})  # noqa: S104

    assert problem.startswith("SUNSET_DEVELOPMENT_ON_NETWORK must be true or false")


@pytest.mark.parametrize("name", ["PUBLIC_URL", "LINK_URL"])
def test_links_are_encrypted_in_production(name: str) -> None:
    """Emailed links carry a bearer token: in production they begin with https, or stay on this machine."""
    [problem] = problems({**PRODUCTION, f"SUNSET_{name}": "http://cancel.example.com"})
    assert problem.startswith(f"SUNSET_{name} must begin with https://")

    Settings.load({**PRODUCTION, f"SUNSET_{name}": "http://localhost:8000"})
    Settings.load({f"SUNSET_{name}": "http://cancel.example.com"})


def test_all_problems_are_told_at_once() -> None:
    """One start, one list: unknown, bad and missing together, each by its variable's name."""
    found = problems(
        {
            "SUNSET_ENVIRONMENT": "production",
            "SUNSET_PORTS": "8000",
            "SUNSET_WORKER": "perhaps",
            "SUNSET_DATABASE_POOL_SIZE": "0",
            "SUNSET_DEMO": "true",
        }
    )

    named = {problem.split()[0] for problem in found}
    assert named == {
        "SUNSET_PORTS",
        "SUNSET_WORKER",
        "SUNSET_DATABASE_POOL_SIZE",
        "SUNSET_DEMO",
        "SUNSET_PUBLIC_URL",
        "SUNSET_SECRET_KEY",
        "SUNSET_OIDC_ISSUER",
        "SUNSET_OIDC_AUDIENCE",
        "SUNSET_SMTP_URL",
    }
    assert len(found) == len(named)


def test_a_mistyped_variable_is_refused_with_the_right_one() -> None:
    assert problems({"SUNSET_DATABASE_ULR": "x"}) == [
        "SUNSET_DATABASE_ULR is not a setting: remove it, or did you mean SUNSET_DATABASE_URL?"
    ]
    [problem] = problems({"sunset_port": "8000"})
    assert "SUNSET_PORT" in problem


def test_other_peoples_variables_are_left_alone() -> None:
    Settings.load({"PATH": "/bin", "SUNSETTER": "1", "PORT": "x"})


BAD = {
    "ENVIRONMENT": ["prod"],
    "HOST": ["two\nlines"],
    "PORT": ["0", "65536", "http", "-1", "8_0 0"],
    "DATA_DIR": ["nul\0"],
    "DATABASE_URL": [
        "mysql://h/d",
        "sqlite://relative.db",
        "sqlite:///",
        "postgres://host",
        "postgres://h:port/d",
        "x",
    ],
    "DATABASE_POOL_SIZE": ["none", "1001"],
    "PUBLIC_URL": ["cancel.example.com", "ftp://h", "https://u:p@h", "https://h/?q=1", "https://h/#f", "https://a b/"],
    "POLICY_FILE": ["/no/such/file.toml"],
    "SECRET_KEY": ["short", "a" * 64, "ab" * 40],
    "OIDC_ISSUER": ["http://id.example.com", "id.example.com", "urn:sunset:development", "https://u@h/"],
    "OIDC_JWKS_URL": ["http://id.example.com/keys"],
    "DEVELOPMENT_ISSUER": ["maybe", "2"],
    "SMTP_URL": ["mail.example.com", "http://h", "smtp://", "smtp://h:0", "smtp://h/path", "smtp://:p@h"],
    "SMTP_STARTTLS": ["on", "optional"],
    "SMTP_TIMEOUT": ["0", "never"],
    "MAIL_FROM": ["Sunset", "a@x.example, b@x.example", "a@x.example\nBcc: b@x.example"],
    "LINK_URL": ["/cancel", "https://h/#token"],
    "LOG_FORMAT": ["xml"],
    "LOG_LEVEL": ["loud"],
    "WORKER_CONCURRENCY": ["0", "65"],
    "GRACE_SECONDS": ["-1", "long"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_named_and_explained(name: str, value: str) -> None:
    """The problem begins with the variable and says what it must be."""
    found = problems({f"SUNSET_{name}": value})

    assert any(problem.startswith(f"SUNSET_{name} must be ") for problem in found)


def test_a_setting_is_read_from_a_file(tmp_path: Path) -> None:
    """`_FILE` names a file whose content, without white space around it, is the value."""
    file = tmp_path / "secret"
    file.write_text(f"\n{SECRET}\n")

    settings = Settings.load({**PRODUCTION, "SUNSET_SECRET_KEY": "", "SUNSET_SECRET_KEY_FILE": str(file)})

    assert settings.secret_key == SECRET
    assert settings.sources["secret_key"] == "file"


def test_a_setting_and_its_file_together_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("8001")

    [problem] = problems({"SUNSET_PORT": "8000", "SUNSET_PORT_FILE": str(file)})

    assert problem == "SUNSET_PORT and SUNSET_PORT_FILE are both set: remove one of them."


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    for name in ("absent", "empty", "binary", "."):
        [problem] = problems({"SUNSET_HOST_FILE": str(tmp_path / name)})
        assert problem.startswith("SUNSET_HOST_FILE names a")
        assert str(tmp_path / name) in problem


def test_problems_tell_no_secret(tmp_path: Path) -> None:
    """Neither a refused secret, nor a password in a URL, nor what is in a file that was named by mistake."""
    file = tmp_path / "other-secret"
    file.write_text("canary-in-file")
    environ = {
        "SUNSET_SECRET_KEY": "canary-key",
        "SUNSET_DATABASE_URL": "mysql://u:canary-db@h/d",
        "SUNSET_SMTP_URL": "http://u:canary-mail@h",
        "SUNSET_PORT_FILE": str(file),
    }

    assert "canary" not in str(SettingsError(problems(environ)))


def test_settings_show_no_secret() -> None:
    """`sunset config`, and a repr in a log or a traceback, hide secrets and the passwords inside URLs."""
    settings = Settings.load(
        {
            **PRODUCTION,
            "SUNSET_DATABASE_URL": "postgres://sunset:p%40ss@db.internal/sunset?password=query-pass&sslmode=require",
        }
    )
    shown = {variable: value for variable, value, _ in settings.describe()}

    for text in (repr(settings), str(settings), str(shown)):
        for secret in (SECRET, "hunter2", "p%40ss", "query-pass"):
            assert secret not in text
    assert shown["SUNSET_SMTP_URL"] == "smtp://sunset:********@mail.example.com:587"
    assert shown["SUNSET_DATABASE_URL"].endswith("@db.internal/sunset?password=********&sslmode=require")
    assert shown["SUNSET_SECRET_KEY"] == "********"


def test_settings_tell_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "host"
    file.write_text("localhost")

    settings = Settings.load({"SUNSET_PORT": "9000", "SUNSET_HOST_FILE": str(file)})

    told = {variable: (value, source) for variable, value, source in settings.describe()}
    assert told["SUNSET_PORT"] == ("9000", "environment")
    assert told["SUNSET_HOST"] == ("localhost", "file")
    assert told["SUNSET_PUBLIC_URL"] == ("http://localhost:9000", "default")


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://localhost:8000"), ("::", "http://localhost:8000"), ("::1", "http://[::1]:8000")],  # noqa: S104
)
def test_links_name_a_host_that_can_be_reached(host: str, url: str) -> None:
    assert Settings.load({"SUNSET_HOST": host, "SUNSET_DEVELOPMENT_ON_NETWORK": "true"}).public_url == url


def test_a_public_url_is_joined_without_doubling_the_slash() -> None:
    assert Settings.load({"SUNSET_PUBLIC_URL": "http://h.example/app/"}).public_url == "http://h.example/app"


def test_an_issuer_is_kept_letter_for_letter() -> None:
    """Issuers are compared as text, so the trailing slash that some providers have must stay."""
    assert Settings.load(PRODUCTION).oidc_issuer == "https://id.example.com/"


def test_half_an_identity_provider_is_refused() -> None:
    """An issuer without an audience would accept tokens meant for others; an audience alone does nothing."""
    [problem] = problems({"SUNSET_OIDC_ISSUER": "https://id.example.com", "SUNSET_DEVELOPMENT_ON_NETWORK": "true"})
    assert problem.startswith("SUNSET_OIDC_AUDIENCE is required")

    [problem] = problems({"SUNSET_OIDC_AUDIENCE": "x"})
    assert problem.startswith("SUNSET_OIDC_AUDIENCE is of no use without SUNSET_OIDC_ISSUER")


@pytest.mark.parametrize("environ", [{}, PRODUCTION], ids=["development", "production"])
def test_mail_is_never_sent_in_clear_to_another_machine(environ: dict[str, str]) -> None:
    [problem] = problems({**environ, "SUNSET_SMTP_URL": "smtp://mail.example.com", "SUNSET_SMTP_STARTTLS": "off"})
    assert problem.startswith("SUNSET_SMTP_STARTTLS must be required for mail.example.com")

    here = {**environ, "SUNSET_SMTP_URL": "smtp://127.0.0.1:1025"}
    assert Settings.load(here).smtp_starttls == "off"
    assert Settings.load({**here, "SUNSET_SMTP_STARTTLS": "required"}).smtp_starttls == "required"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1"])
def test_these_hosts_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "", "127.1", "::"])
def test_these_hosts_may_be_another_machine(host: str) -> None:
    assert not is_loopback(host)


def documented() -> list[Documentation]:
    return Settings.documentation()


def test_every_setting_is_documented() -> None:
    """Description, default and example of each, in the order of `describe`."""
    assert [entry.variable for entry in documented()] == [variable for variable, _, _ in Settings.load({}).describe()]
    for entry in documented():
        assert entry.description.endswith("."), entry.variable
        assert entry.default, entry.variable
        assert entry.example, entry.variable


@pytest.mark.parametrize("entry", documented(), ids=lambda entry: entry.variable)
def test_the_documented_example_is_accepted(entry: Documentation, tmp_path: Path) -> None:
    """Each example is a usable value, but for the file that must exist and the secret that must be one's own."""
    example = entry.example
    if entry.variable == "SUNSET_POLICY_FILE":
        (tmp_path / "policy.toml").touch()
        example = str(tmp_path / "policy.toml")
    environ = {**PRODUCTION, entry.variable: example}

    if entry.secret:
        [problem] = problems(environ)
        assert problem.startswith(f"{entry.variable} is the example from the documentation")
    else:
        assert entry.variable in {
            variable for variable, _, source in Settings.load(environ).describe() if source != "default"
        }


def test_keys_of_different_purposes_differ() -> None:
    """A key is the same for the same secret and purpose, and tells nothing about the key of another."""
    settings, again = Settings.load(PRODUCTION), Settings.load(PRODUCTION)
    other = Settings.load({**PRODUCTION, "SUNSET_SECRET_KEY": SECRET[::-1]})

    assert settings.derive_key("links") == again.derive_key("links")
    assert len({settings.derive_key("links"), settings.derive_key("codes"), other.derive_key("links")}) == 3
    assert len(settings.derive_key("links")) == 32


def test_loading_writes_nothing(tmp_path: Path) -> None:
    """`sunset config` and a failing start leave no trace."""
    repr(Settings.load({"SUNSET_DATA_DIR": str(tmp_path / "var")}))

    assert not (tmp_path / "var").exists()


def test_the_development_key_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    environ = {"SUNSET_DATA_DIR": str(tmp_path / "var")}

    first = Settings.load(environ).derive_key("links")

    assert Settings.load(environ).derive_key("links") == first
    [file] = (tmp_path / "var").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "var").stat().st_mode) == 0o700


def derive(data_dir: str) -> bytes:
    return Settings.load({"SUNSET_DATA_DIR": data_dir}).derive_key("links")


def test_processes_that_start_together_agree_on_the_development_key(tmp_path: Path) -> None:
    """Eight processes that all find no key end with one, and leave no drafts behind."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        keys = pool.map(derive, [str(tmp_path / "var")] * 8, chunksize=1)

    assert len(set(keys)) == 1
    assert [file.name for file in (tmp_path / "var").iterdir()] == ["secret.key"]


def test_the_loser_of_the_race_takes_the_winners_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that saw no file, and finds one when it puts its own in place, uses that one."""
    environ = {"SUNSET_DATA_DIR": str(tmp_path)}
    winner = Settings.load(environ).derive_key("links")
    monkeypatch.setattr(Path, "exists", lambda self: False)

    assert Settings.load(environ).derive_key("links") == winner
    assert [file.name for file in tmp_path.iterdir()] == ["secret.key"]


def test_a_damaged_development_key_is_refused(tmp_path: Path) -> None:
    """Rather than signing with a weak key, or silently replacing one that made links out there."""
    (tmp_path / "secret.key").write_text("oops")

    with pytest.raises(SettingsError, match=r"secret\.key holds no usable key"):
        Settings.load({"SUNSET_DATA_DIR": str(tmp_path)}).derive_key("links")


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match="SUNSET_DATA_DIR"):
        Settings.load({"SUNSET_DATA_DIR": str(tmp_path / "file")}).derive_key("links")
