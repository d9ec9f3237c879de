"""Papers from the Hugging Face Hub, by `huggingface_hub`'s own calls."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etude.papers.catalogue import arxiv_number
from etude.papers.shelf import Listing
from etude.values.errors import InputError

MOST = 100
"""Papers that are asked for at once."""


def daily(date: str | None = None) -> list[Listing]:
    """The papers that the Hub lists for a day (2024-02-14), by default the newest.

    Raises InputError for what is no date, and where the Hub cannot be reached.
    """
    if date is not None:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise InputError(f"{date!r} is no date", remedy="Write it as in 2024-02-14.") from None
    with _asking(f"the papers of {date or 'today'}"):
        return [listing for info in _api().list_daily_papers(date=date, limit=MOST) if (listing := _listing(info))]


def paper(number: str) -> Listing:
    """One paper by its arXiv number.  Raises InputError if that is none, or the Hub has no such paper or cannot be reached."""
    known = arxiv_number(number)
    if known is None:
        raise InputError(f"{number!r} is no arXiv number", remedy="Give one as in 2402.09025, or the paper's address.")
    with _asking(f"paper {known}"):
        listing = _listing(_api().paper_info(known))
    if listing is None:
        raise InputError(f"the Hub knows no title of paper {known}")
    return listing


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turn what may go wrong on the way to the Hub into one message."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise InputError(f"{what} cannot be asked for: HF_HUB_OFFLINE is set", remedy="Unset it, or use `etude papers import FILE`.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 404:
            raise InputError(f"the Hub has not {what}", remedy="`etude papers import FILE` takes BibTeX, JSON Lines and saved pages.") from error
        raise InputError(f"the Hub would not give {what}: {str(error).splitlines()[0]}", remedy="Try again later.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"what the Hub says of {what} cannot be read: {error}", remedy="Is HF_ENDPOINT the address of a Hub?") from error
    except Exception as error:  # of whatever HTTP client huggingface_hub stands on
        if not type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3")) and not isinstance(error, OSError):
            raise
        raise InputError(f"the Hub cannot be reached: {error}", remedy="Check the network and HF_ENDPOINT, or use `etude papers import FILE`.") from error


def _listing(info: Any) -> Listing | None:
    """What the Hub says of a paper; None if it does not even say its title."""
    if not (info.title or "").strip():
        return None
    when = info.published_at or info.submitted_at
    return Listing(
        " ".join(info.title.split()), " ".join((info.summary or "").split()), arxiv_number(info.id or ""), when.date().isoformat() if when else None,
        len(info.authors) if info.authors else None, info.comments, info.upvotes,
    )  # fmt: skip
