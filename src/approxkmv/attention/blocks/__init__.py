"""Methods that group queries into blocks of near neighbours: ApproxKMV, local expansion, clustered attention."""
