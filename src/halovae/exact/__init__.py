"""A network on shards of the picture, exactly: layouts, halos, and one rule for each torch operator."""
