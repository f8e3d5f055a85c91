"""Numbers: each command measures by ratio in one interleaved run and prints a table, then one JSON line."""
