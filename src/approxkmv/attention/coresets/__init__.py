"""Methods that do not ask which keys a query needs: few keys for all queries, or those near its position."""
