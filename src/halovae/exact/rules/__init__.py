"""One rule for each torch operator on shards, a family of operators a file."""
