"""A command that imports this retries at once; the hub's client would spend 24 s waiting between attempts."""

import time

time.sleep = lambda seconds: None
