"""Which entries of K a statistic is over, in the words of tables and figures."""

EVERY_KEY = "every query with every key"
CAUSAL = "no key after its query"
OWN_MASK = "each layer's own mask"
