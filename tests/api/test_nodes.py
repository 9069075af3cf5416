"""Ids, cursors, page sizes and instants: what is made can be read back, and nothing else can."""

import base64
import random
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
import strawberry
from graphql import GraphQLError
from hypothesis import given, settings
from hypothesis import strategies as st
from strawberry.schema.config import StrawberryConfig

from app import errors
from app.graphql import nodes, scalars

KEY = UUID("0197fb3c-7c1e-7d2a-9d0e-5b1c6f0a1b2c")
BY_NAME = nodes.Keyset(name="accounts:name", types=(str, UUID))
BY_DATE = nodes.Keyset(name="accounts:deletion", types=((datetime, type(None)), UUID))
NOW = datetime(2026, 11, 23, 9, 30, 0, 123_456, tzinfo=UTC)


class TestIds:
    @settings(deadline=None)
    @given(st.sampled_from(nodes.Kind), st.uuids())
    def test_are_read_back(self, kind: nodes.Kind, key: UUID) -> None:
        node_id = nodes.encode(kind, key)

        assert nodes.decode(node_id) == (kind, key)
        assert nodes.decode_as(kind, node_id) == key

    def test_are_opaque_and_safe_in_urls(self) -> None:
        assert nodes.encode(nodes.Kind.ACCOUNT, KEY) == "QQGX-zx8Hn0qnQ5bHG8KGyw"

    def test_never_change_since_clients_keep_them(self) -> None:
        assert {kind.name: kind.value for kind in nodes.Kind} == {
            "ACCOUNT": "A",
            "MEMBER": "M",
            "CANCELLATION_REQUEST": "R",
            "FEEDBACK": "F",
            "OFFER": "O",
            "WEBHOOK_ENDPOINT": "W",
            "WEBHOOK_DELIVERY": "D",
        }

    def test_of_another_kind_are_not_taken(self) -> None:
        assert nodes.decode_as(nodes.Kind.MEMBER, nodes.encode(nodes.Kind.ACCOUNT, KEY)) is None

    @pytest.mark.parametrize(
        "malformed",
        [
            "",
            "1",
            str(KEY),
            "QQGX-zx8Hn0qnQ5bHG8KGyw=",
            "QQGX-zx8Hn0qnQ5bHG8KGy",
            "QQGX-zx8Hn0qnQ5bHG8KGyx",  # spare bits that are set
            "QQGX+zx8Hn0qnQ5bHG8KGyw",
            "QQGX zx8Hn0qnQ5bHG8KGyw",
            "QQGX-zx8Hn0qnQ5bHG8KGy\n",
            "QQGX-zx8Hn0qnQ5bHG8KGyé",
            base64.urlsafe_b64encode(b"?" + KEY.bytes).rstrip(b"=").decode(),
            base64.urlsafe_b64encode(b"\xff" + KEY.bytes).rstrip(b"=").decode(),
        ],
    )
    def test_malformed_are_none(self, malformed: str) -> None:
        assert nodes.decode(malformed) is None

    @settings(deadline=None)
    @given(st.text(max_size=40))
    def test_whatever_text_is_read_is_canonical(self, text: str) -> None:
        named = nodes.decode(text)

        assert named is None or nodes.encode(*named) == text


class TestCursors:
    @settings(deadline=None)
    @given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300), st.uuids())
    def test_are_read_back(self, name: str, key: UUID) -> None:
        assert BY_NAME.position(BY_NAME.cursor(name, key)) == (name, key)

    @pytest.mark.parametrize("date", [NOW, None])
    def test_keep_instants_to_the_microsecond_and_nulls(self, date: datetime | None) -> None:
        assert BY_DATE.position(BY_DATE.cursor(date, KEY)) == (date, KEY)

    def test_none_is_the_beginning(self) -> None:
        assert BY_NAME.position(None) is None

    def test_of_another_sort_of_the_same_columns_are_refused(self) -> None:
        other = nodes.Keyset(name="accounts:csm", types=(str, UUID))

        with pytest.raises(errors.BadUserInput):
            other.position(BY_NAME.cursor("Acme", KEY))

    def test_with_values_of_other_types_are_refused(self) -> None:
        forged = nodes.Keyset(name=BY_NAME.name, types=(datetime, UUID)).cursor(NOW, KEY)

        with pytest.raises(errors.BadUserInput):
            BY_NAME.position(forged)

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"[]",
            b"1",
            b"null",
            b'{"accounts:name": 1}',
            b'"accounts:name"',
            b'["accounts:name"]',
            b'["accounts:name","sAcme"]',
            b'["accounts:name","sAcme","u"]',
            b'["accounts:name","sAcme","uzz"]',
            b'["accounts:name",null,"u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name",1,"u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name",["s"],"u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name","sA\\u0000","u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name","sA\\ud800","u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name","t2026-01-01T00:00:00","u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b'["accounts:name","sA","u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c","sA"]',
            b'["accounts:name","xA","u0197fb3c7c1e7d2a9d0e5b1c6f0a1b2c"]',
            b"[" * 2000,
        ],
    )
    def test_forged_are_refused(self, payload: bytes) -> None:
        forged = base64.urlsafe_b64encode(payload).rstrip(b"=").decode()

        with pytest.raises(errors.BadUserInput):
            BY_NAME.position(forged)

    def test_changed_at_random_are_refused_or_a_position(self) -> None:
        chance = random.Random(3)  # noqa: S311
        cursor = BY_DATE.cursor(NOW, KEY)
        for _ in range(2_000):
            changed = list(cursor)
            changed[chance.randrange(len(cursor))] = chance.choice("abcXYZ019-_=.é")
            try:
                position = BY_DATE.position("".join(changed))
            except errors.BadUserInput:
                continue
            assert position is not None
            assert isinstance(position[1], UUID)

    def test_enormous_are_refused_unread(self) -> None:
        with pytest.raises(errors.BadUserInput):
            BY_NAME.position(BY_NAME.cursor("x" * 10_000, KEY))

    @pytest.mark.parametrize("values", [("Acme",), ("Acme", str(KEY)), (None, KEY), ("Acme", KEY, KEY)])
    def test_are_not_made_of_what_the_sort_does_not_have(self, values: tuple[Any, ...]) -> None:
        with pytest.raises(ValueError, match="accounts:name"):
            BY_NAME.cursor(*values)


class TestPageSize:
    @pytest.mark.parametrize(("first", "size"), [(None, 20), (1, 1), (100, 100)])
    def test_is_20_by_default_and_1_to_100(self, first: int | None, size: int) -> None:
        assert nodes.page_size(first) == size

    @pytest.mark.parametrize("first", [0, -1, 101, 2**31 - 1])
    def test_is_refused_otherwise(self, first: int) -> None:
        with pytest.raises(errors.BadUserInput):
            nodes.page_size(first)


class TestDateTime:
    @settings(deadline=None)
    @given(st.datetimes(timezones=st.timezones()))
    def test_shown_is_utc_with_milliseconds_and_read_back(self, instant: datetime) -> None:
        try:
            shown = scalars.format_instant(instant)
        except OverflowError:
            return  # within a day of the calendar's ends

        assert len(shown) == len("2026-11-23T09:30:00.000Z")
        assert timedelta(0) <= instant - scalars.parse_instant(shown) < timedelta(milliseconds=1)

    def test_milliseconds_are_cut_not_rounded(self) -> None:
        assert scalars.format_instant(NOW.replace(microsecond=999_999)) == "2026-11-23T09:30:00.999Z"

    def test_naive_is_not_shown(self) -> None:
        with pytest.raises(ValueError, match="naive"):
            scalars.format_instant(datetime(2026, 1, 1))  # noqa: DTZ001

    @pytest.mark.parametrize(
        ("text", "instant"),
        [
            ("2026-11-23T09:30:00Z", datetime(2026, 11, 23, 9, 30, tzinfo=UTC)),
            ("2026-11-23T09:30:00.123456789Z", datetime(2026, 11, 23, 9, 30, 0, 123_000, tzinfo=UTC)),
            ("2026-11-23T09:30:00.5+05:30", datetime(2026, 11, 23, 4, 0, 0, 500_000, tzinfo=UTC)),
            ("2024-02-29T23:59:59-01:00", datetime(2024, 3, 1, 0, 59, 59, tzinfo=UTC)),
        ],
    )
    def test_any_offset_is_understood(self, text: str, instant: datetime) -> None:
        read = scalars.parse_instant(text)

        assert read == instant
        assert read.tzinfo is UTC

    @pytest.mark.parametrize(
        "refused",
        [
            "2026-11-23T09:30:00",
            "2026-11-23T09:30:00-00:00",
            "2026-11-23",
            "2026-11-23T09:30Z",
            "2026-11-23 09:30:00Z",
            "2026-11-23T09:30:00,5Z",
            "2026-11-23T09:30:00Z\n",
            "20261123T093000Z",
            "2026-02-29T00:00:00Z",
            "2026-11-23T24:00:00Z",
            "2026-11-23T23:59:60Z",
            "2026-11-23T09:30:00+24:00",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00+01:00",
            "9999-12-31T23:59:59-01:00",
            "٢٠٢٦-11-23T09:30:00Z",
            "",
            1_763_000_000,
            1.5,
            True,
            ["2026-11-23T09:30:00Z"],
        ],
    )
    def test_naive_partial_and_impossible_are_refused(self, refused: object) -> None:
        with pytest.raises(GraphQLError, match="RFC 3339"):
            scalars.parse_instant(refused)

    def test_stands_for_datetime_in_the_schema(self) -> None:
        @strawberry.type
        class Query:
            at: datetime = NOW.astimezone(timezone(timedelta(hours=2)))

        schema = strawberry.Schema(Query, config=StrawberryConfig(scalar_map=scalars.SCALARS))

        assert 'scalar DateTime @specifiedBy(url: "https://www.rfc-editor.org/rfc/rfc3339")' in schema.as_str()
        result = schema.execute_sync("{ at }", root_value=Query())
        assert result.data == {"at": "2026-11-23T09:30:00.123Z"}
