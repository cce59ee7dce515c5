"""Queries in blocks of near neighbours: ApproxKMV's idea, local expansion, clustered attention."""
