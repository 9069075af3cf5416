"""`sunset restored`, and halting deletions by hand, as somebody at a terminal does."""

import gzip
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from app import db, halts, restores
from tests.actions.test_restores import BackUp
from tests.cast import BILLING, Stage
from tests.cli.conftest import Play, Run
from tests.cli.test_doctor import troubles
from tests.ending import log_in_memory


def test_deletions_are_halted_and_go_on(sunset: Run, play: Play) -> None:
    async def canceled(house: Stage) -> None:
        await house.cancel()
        await house.letters()
        await db.advance_clock(timedelta(days=60))

    play(canceled)
    assert sunset("deletions", "halt", "--note", "A fault.").out == "No deletion begins any more.\n"
    listed = sunset("deletions", "list", "--due").out
    assert re.search(r"^Halted since .* UTC, OPERATOR: A fault\.$", listed, re.MULTILINE)
    assert "no, halted" in listed
    assert "A fault." in troubles(sunset("doctor"))["deletion_halt"]
    assert (
        "1 fall due within 24 hours, the breaker lets 10 begin now"
        in sunset("deletions", "resume", "--note", "Mended.").out
    )
    again = sunset("deletions", "resume", "--note", "Mended.")
    assert (again.status, again.err) == (1, "sunset: No such halt lasts; there is nothing to resume.\n")
    assert sunset("deletions", "halt", "--note", "").status == 1


def test_a_restore_is_said_and_what_is_lost_is_printed(sunset: Run, play: Play, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def lost(house: Stage) -> None:
        await house.cancel()
        back_up = BackUp(db.bound())
        with log_in_memory() as stream:
            await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
        log.write_text(stream.getvalue())
        await restores.check(house.installation)
        back_up.restore()
        trouble.append(await restores.examine(house.installation))

    trouble: list[restores.Finding | None] = []
    play(lost)
    assert trouble[0] is not None
    said = sunset("restored", "--as-of", "2026-01-31T04:00Z", "--log", str(log))
    assert said.status == 0
    assert "as of 2026-01-31 04:00:00 UTC." in said.out
    assert re.search(r"^# \S+: 1 transitions, from .* UTC to .* UTC$", said.out, re.MULTILINE)
    packed = tmp_path / "log.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    again = sunset("restored", "--as-of", "2026-01-31T04:00Z", "--log", str(packed))
    assert again.out.replace("log.gz", "log") == said.out
    assert re.search(r"^#   .* UTC  account\.restarted  by STAFF, then ACTIVE$", said.out, re.MULTILINE)
    assert len(re.findall(r"^curl .*restartAccount", said.out, re.MULTILINE)) == 1
    assert all(line.startswith(("#", "curl ")) for line in said.out.splitlines() if line), "it can be run"
    assert sunset("restored", "--as-of", "2026-01-31T05:00+01:00").status == 0
    assert "status of 4 accounts is still" in sunset("doctor").out
    assert "restored, and no deletion begins" in sunset("doctor").out


def test_what_has_not_been_found_yet_does_not_end_with_what_has(sunset: Run, play: Play) -> None:
    """Somebody resumes before any process has looked at the database that was restored."""

    back_ups = []

    async def backed_up(house: Stage) -> None:
        await halts.halt(house.installation, "A fault.")
        back_ups.append(BackUp(db.bound()))
        await house.cancel()
        await restores.check(house.installation)

    play(backed_up)
    back_ups[0].restore()
    refused = sunset("deletions", "resume", "--note", "Mended.")
    assert refused.status == 1
    assert "Several halts last, OPERATOR, RESTORED." in refused.err
    resumed = sunset("deletions", "resume", "--note", "Mended.", "--cause", "OPERATOR")
    assert re.search(r"^Ended: OPERATOR since .*\nStill halted: RESTORED since ", resumed.out)


def test_what_happened_shortly_before_may_be_lost_and_the_log_knows_of_earlier_restores(
    sunset: Run, play: Play, tmp_path: Path
) -> None:
    """The time that somebody gives is rarely exact; on a new machine nothing but the log knows the epochs."""
    log, times, counts = tmp_path / "log", list[datetime](), list[int]()

    async def lost(house: Stage) -> None:
        back_up = BackUp(db.bound())
        with log_in_memory() as stream:
            await house.cancel()
        times.append(await db.now())
        log.write_text(re.sub(r'"epoch": ?(\d)\b', r'"epoch":300000\1', stream.getvalue()))
        back_up.restore()

    play(lost)
    said = sunset("restored", "--as-of", times[0].isoformat(), "--log", str(log))
    assert re.search(r"^#   .* UTC  account\.canceled  by MEMBER, then CANCELED$", said.out, re.MULTILINE)

    async def told(_: Stage) -> None:
        counts.append((await restores.restatement()).restores)

    play(told)
    assert counts == [4]


@pytest.mark.parametrize("time", ["yesterday", "2026-01-31T04:00", "2026-13-01T00:00Z"])
def test_a_time_that_cannot_be_meant_is_wrong_usage(migrated: Run, time: str) -> None:
    result = migrated("restored", "--as-of", time)
    assert result.status == 2
    assert "--as-of" in result.err


def test_a_time_that_has_not_come_and_a_log_that_is_none_are_refused(migrated: Run, tmp_path: Path) -> None:
    result = migrated("restored", "--as-of", "2999-01-31T04:00Z")
    assert (result.status, result.err) == (1, "sunset: That time has not come.\n")
    (tmp_path / "log").write_text("2026-01-31 [info] http.request\n")
    result = migrated("restored", "--as-of", "2026-01-31T04:00Z", "--log", str(tmp_path / "log"))
    assert result.status == 1
    assert "SUNSET_LOG_FORMAT" in result.err
    assert migrated("restored", "--as-of", "2026-01-31T04:00Z", "--log", str(tmp_path / "none")).status == 1
