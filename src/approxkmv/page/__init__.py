"""One page for a study: its verdict, the paper's claims, an explorer of its heads, and its figures."""
