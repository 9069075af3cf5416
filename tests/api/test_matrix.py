"""Every root operation of the schema x every kind of caller x every state of an account: what comes of it.

The table is written by hand and the operations are taken from the schema: one without a row here fails. Whatever is
refused is seen to have changed nothing.
"""

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import graphql
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from graphql import GraphQLField, GraphQLObjectType

from app import accounts, db, provisioning
from app.db import Database, uuid7
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.graphql.schema import printed
from app.lifecycle import LinkPurpose, MemberRole, Permission, StaffRole
from app.messages import LinkGrant
from app.models import Account, CancellationRequest, Member, Offer, Service, Staff
from app.tokens import DEVELOPMENT_ISSUER
from tests import cast
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GATEKEEPER, GINA, HOST, SUPPORT, Stage

STATES = ("ACTIVE", "ASSISTANCE", "PENDING", "SCHEDULED", "CANCELED", "CLOSED", "DELETING", "DELETED")
"""ASSISTANCE and PENDING: active, with alice's request open. CLOSED: canceled, and the time to restart is over."""

# Who asks about acme, which names the Customer Success Manager `csm`:
#   admin, permitted, member   alice, who asked to cancel; carol, who has the permission; and who has it not (any more)
#   stranger                   the admin of another account
#   ..._link                   the bearer of a link in alice's emails; ungranted: who has lost the permission since;
#                              foreign: about another account
#
# ok: done, or shown. null: nothing there. forbidden, removed: the top-level errors FORBIDDEN and ACCESS_REMOVED.
# missing: NotFoundError, denied: PermissionDeniedError, state: AccountStateError, asked:
# CancellationAlreadyRequestedError, closed: RestartWindowClosedError. One word stands for all states.
#
# Members whose account is canceled are told so, whatever they ask; once its data is gone nobody knows them.
TABLE = """
viewer
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

plans
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

feedbackReasons
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

account
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

accounts
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

cancellationRequests
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

cancellationPreview
  admin, permitted                 ok        ok        ok        null      removed   removed   removed   forbidden
  member                           forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok        ok        ok        null      null      null      null      null
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

node
  admin, permitted                 ok        ok        ok        ok        removed   removed   removed   forbidden
  member                           null      null      null      null      removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

cancelAccount
  admin                            ok        ok        ok        state     removed   removed   removed   forbidden
  permitted                        ok        asked     asked     state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, billing                     ok        ok        asked     state     state     state     state     state
  other_csm, support               denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

submitFeedback
  admin, permitted                 ok        ok        ok        ok        removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     ok        ok        ok        ok        removed   removed   removed   forbidden
  feedback_link                    ok        ok        ok        ok        ok        ok        state     forbidden
  restart_link                     denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

acceptOffer
  admin, permitted                 state     ok        ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

declineOffer
  admin, permitted                 state     ok        ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

withdrawCancellation
  admin, permitted                 state     ok        ok        ok        removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm                              state     ok        ok        ok        state     state     state     state
  other_csm, billing, support      denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

confirmCancellation
  admin, permitted                 state     state     ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     state     state     ok        state     removed   removed   removed   forbidden
  feedback_link, restart_link      missing
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

restartAccount
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  billing                          state     state     state     state     ok        closed    closed    closed
  csm, other_csm, support          denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

requestRestart
  admin, permitted, member         missing   missing   missing   missing   removed   removed   removed   forbidden
  stranger, host, gatekeeper       missing
  csm, other_csm, billing, support missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link                    denied    denied    denied    denied    denied    denied    denied    forbidden
  restart_link                     state     state     state     state     ok        closed    closed    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     state

syncAccounts
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  host                             ok
  stranger, gatekeeper             denied
  csm, other_csm, billing, support denied
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   denied    denied    denied    denied    denied    denied    denied    forbidden
  foreign_link                     denied
""".replace(
    "  feedback_link, restart_link      missing\n",
    "  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden\n",
)
