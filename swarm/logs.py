"""Where a command's log goes and how it looks: lines for people, or one JSON object per line for programs.

add_arguments(parser) ─► args ─► configure(args) ─► the root logger writes to stderr

{"time": "2026-11-27T09:30:00.123Z", "level": "warning", "logger": "swarm.server.tenancy", "message": "..."}
"""

import argparse
import json
import logging
import sys
from datetime import UTC, datetime

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --log-level and --log-format to a command."""
    parser.add_argument(
        "--log-level", choices=LEVELS, default="warning", help="how much to log to stderr (default: %(default)s)"
    )
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="how log lines look: for people, or one JSON object per line (default: %(default)s)",
    )


def configure(args: argparse.Namespace) -> None:
    """Log as `add_arguments` let the user choose."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if args.log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler])


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: time, level, logger, message, and the traceback where there is one."""
        when = datetime.fromtimestamp(record.created, UTC)
        entry = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
