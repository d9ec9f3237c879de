"""Sending the digest, and who wants it."""

from __future__ import annotations

import datetime
import json
import os
import smtplib
import ssl
import urllib.parse
from dataclasses import asdict, dataclass, replace
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path

import filelock

from etude.papers.digest import Digest
from etude.papers.trending import span
from etude.study.store import Store, write_atomically, writing
from etude.values.errors import InputError

SERVER, PASSWORD, SENDER = "ETUDE_SMTP", "ETUDE_SMTP_PASSWORD", "ETUDE_SMTP_FROM"
"""Variables: the server as ``smtp://user@host:587`` (STARTTLS where it is offered) or ``smtps://user@host:465``, the password, and who the mail is from."""
PATIENCE = 30.0
"""Seconds to wait for the server."""


@dataclass(frozen=True)
class Subscription:
    """Who gets the digest, of what, how often."""

    address: str
    words: str = ""
    """Only papers that a search for these finds."""
    every: str = "7d"
    sent: str | None = None
    """The day up to which the last one told."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", checked(self.address))
        span(self.every)

    def since(self, today: datetime.date) -> datetime.date:
        """The day after which the next one begins."""
        return datetime.date.fromisoformat(self.sent) if self.sent else today - datetime.timedelta(span(self.every))

    def due(self, today: datetime.date) -> bool:
        return self.sent is None or (today - datetime.date.fromisoformat(self.sent)).days >= span(self.every)


@dataclass(frozen=True)
class Subscriptions:
    """Those of a store: ``papers/subscriptions.json``."""

    store: Store

    @property
    def path(self) -> Path:
        return self.store.root / "papers" / "subscriptions.json"

    def all(self) -> list[Subscription]:
        if not self.path.exists():
            return []
        try:
            return [Subscription(**row) for row in json.loads(self.path.read_text(encoding="utf8"))]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.path} cannot be read: {error}", remedy="Mend it, or delete it and subscribe again.") from error

    def put(self, one: Subscription) -> bool:
        """Add a subscription, or change that of its address; returns whether it is new."""
        with self._changing() as rows:
            new = one.address not in rows
            rows[one.address] = one
        return new

    def remove(self, address: str) -> None:
        """Raises InputError if the address has no subscription."""
        with self._changing() as rows:
            if address not in rows:
                raise InputError(f"{address} has no subscription", remedy=f"There are {', '.join(rows) or 'none'}.")
            del rows[address]

    def sent(self, one: Subscription, until: datetime.date) -> None:
        """Note that its digest went out."""
        with self._changing() as rows:
            if one.address in rows:
                rows[one.address] = replace(rows[one.address], sent=until.isoformat())

    def _changing(self) -> _Changing:
        return _Changing(self)


class _Changing:
    """The subscriptions by address, written back at the end; one process at a time."""

    def __init__(self, kept: Subscriptions):
        self.kept, self.lock = kept, filelock.FileLock(kept.store.locks / "subscriptions.lock")

    def __enter__(self) -> dict[str, Subscription]:
        self.lock.acquire()
        try:
            self.rows = {one.address: one for one in self.kept.all()}
        except BaseException:
            self.lock.release()
            raise
        return self.rows

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                with writing(self.kept.path):
                    self.kept.path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self.kept.path, json.dumps([asdict(one) for one in self.rows.values()], indent=1) + "\n")
        finally:
            self.lock.release()


def checked(address: str) -> str:
    """A mail address, as it is given.  Raises InputError if it is none, or could carry a header of its own."""
    try:
        if not address.isprintable() or "," in address:
            raise ValueError("it holds characters that no address has")
        known = Address(addr_spec=address)
        if not known.username or ("." not in known.domain and known.domain != "localhost"):
            raise ValueError("it has no name or no domain")
    except (ValueError, LookupError, MessageError) as error:
        raise InputError(f"{address!r} is no mail address: {error}", remedy="Write it as in me@example.org.") from error
    return address


def message(digest: Digest, to: str) -> EmailMessage:
    """The digest as a mail: text, with HTML beside it."""
    mail = EmailMessage()
    mail["Subject"], mail["To"] = digest.subject, checked(to)
    mail["From"] = checked(os.environ.get(SENDER) or to)
    mail["Date"], mail["Message-ID"] = formatdate(localtime=False), make_msgid(domain=mail["From"].addresses[0].domain)
    mail.set_content(digest.as_text())
    mail.add_alternative(digest.as_html(), subtype="html")
    return mail


def send(mail: EmailMessage) -> None:
    """Hand a mail to the server that ``ETUDE_SMTP`` names.  Raises InputError if there is none, or it will not take the mail."""
    address = os.environ.get(SERVER)
    if not address:
        raise InputError(f"no mail server is named: {SERVER} is not set", remedy=f"Set {SERVER}=smtp://user@host:587 (and {PASSWORD}), or write the digest with --out FILE.")
    parts = urllib.parse.urlsplit(address if "://" in address else f"smtp://{address}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname or port == -1:
        raise InputError(f"{SERVER} is no mail server's address: {parts.scheme}://{parts.hostname or ''}", remedy="Write it as in smtp://user@host:587 or smtps://user@host:465.")
    secure = ssl.create_default_context()
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(parts.hostname, port or 465, timeout=PATIENCE, context=secure)
        else:
            server = smtplib.SMTP(parts.hostname, port or 25, timeout=PATIENCE)
        with server:
            server.ehlo()
            if parts.scheme == "smtp" and server.has_extn("starttls"):
                server.starttls(context=secure)
                server.ehlo()
            if parts.username:
                if parts.scheme == "smtp" and not isinstance(server.sock, ssl.SSLSocket) and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
                    raise InputError(f"{parts.hostname} offers no encryption, and the password would go in the clear", remedy="Use smtps://, or a server with STARTTLS.")
                server.login(urllib.parse.unquote(parts.username), os.environ.get(PASSWORD) or urllib.parse.unquote(parts.password or ""))
            server.send_message(mail)
    except smtplib.SMTPException as error:
        raise InputError(f"{parts.hostname} would not take the mail: {error}", remedy=f"Check {SERVER}, {PASSWORD} and {SENDER}.") from error
    except OSError as error:
        raise InputError(f"{parts.hostname} cannot be reached: {error}", remedy=f"Check {SERVER}.") from error
