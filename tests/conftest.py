"""What tests start can be interrupted, also when the tests themselves run in the background.

A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
