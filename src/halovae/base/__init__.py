"""Options, errors, geometry and the like: what every room uses, and that knows no other room."""
