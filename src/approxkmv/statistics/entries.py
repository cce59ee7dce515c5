"""Names, in tables and figures, for the entries of K that a statistic is over."""

EVERY_KEY = "every query with every key"
CAUSAL = "no key after its query"
OWN_MASK = "each layer's own mask"
# Shares of a row's softmax mass whose keys are counted.
SHARES = (0.9, 0.99)
