"""What users call: parallelize, optimize, sharded."""
