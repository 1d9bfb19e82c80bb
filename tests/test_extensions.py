"""What a user adds in a file of their own, outside the package, works from a config and from Python."""
