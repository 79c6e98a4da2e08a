"""HTTP below the routes: limits, tokens, errors, logs."""
