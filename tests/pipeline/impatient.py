"""A command that imports this does not wait: the hub's client would for 24 s between its attempts."""

import time

time.sleep = lambda seconds: None
