"""Text from elsewhere, such as a prompt, an answer or a file's name, as a terminal may be given it."""

import logging
import re

# What a terminal acts on or cannot show: control characters but tab and newline (ESC and the 8-bit CSI begin
# sequences), those that turn the reading direction, and half characters, which cannot be written.
ACTING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with everything a terminal would act on written out, as ``\\x1b`` for ESC."""
    return ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class VisibleFormatter(logging.Formatter):
    """Of logs that end in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
